"""The events of Anthropic's streams, put together to the message that they are parts of."""

from __future__ import annotations

from typing import Any

from promptfleet_workers.providers.protocol import Received
from promptfleet_workers.providers.responses import bad_response, read_json, tokens, truncated
from promptfleet_workers.providers.sse import Event
from promptfleet_workers.providers.streams import OnText, Parts, TextTap, Weight, decoded

_Json = dict[str, Any]
_ENTRY_BYTES = 100


class MessageAssembly:
    """Puts the events of a message's stream together."""

    def __init__(self, *, on_text: OnText | None = None, received: Received | None = None) -> None:
        """Expect the first event; `on_text` hears the text as it comes."""
        self._received = received
        self._tap = TextTap(on_text)
        self._message: _Json | None = None
        self._usage: _Json = {}
        self._blocks: dict[int, _Json] = {}
        self._inputs: dict[int, Parts] = {}
        self._weight = Weight()
        self._is_over = False
        self.has_begun = False

    def add(self, event: Event) -> bool:
        """Take the next event; true if it was the last one.

        Raises:
            ProviderError: The event tells of a failure, or can't be understood.
        """
        data = decoded(event, has_begun=self.has_begun)
        kind = data.get("type") or event.name.decode("latin-1")
        match kind:
            case "message_start":
                self._message = dict(_object(data, "message"))
                self._weight.add(len(event.data))
                self._count(self._message.pop("usage", None))
            case "content_block_start":
                self._start_block(_index(data), _object(data, "content_block"), len(event.data))
            case "content_block_delta":
                self._grow(_index(data), _object(data, "delta"), len(event.data))
            case "message_delta":
                self._weight.add(len(event.data))
                self._whole_message.update(_object(data, "delta"))
                self._count(data.get("usage"))
            case "message_stop":
                self._is_over = True
            case _:
                pass  # pings, ends of blocks, and what will be invented
        return self._is_over

    def end(self, pending: bytes) -> _Json:  # noqa: ARG002 - its end is an event as any other
        """The message, in the shape of one that was not streamed.

        Raises:
            ProviderError: Its end never came.
        """
        if not self._is_over:
            raise truncated()
        message = self._whole_message
        content = [self._block(index) for index in sorted(self._blocks)]
        return {**message, "content": content, "usage": self._usage}

    @property
    def _whole_message(self) -> _Json:
        if self._message is None:
            raise bad_response("the stream has no beginning of a message")
        return self._message

    def _count(self, usage: Any) -> None:
        """Later counts replace earlier ones; what they leave out stays."""
        if type(usage) is dict:
            self._usage.update({name: value for name, value in usage.items() if value is not None})
            if self._received is not None:
                self._received.cached = tokens(self._usage.get("cache_read_input_tokens"))
                self._received.input = (
                    tokens(self._usage.get("input_tokens"))
                    + self._received.cached
                    + tokens(self._usage.get("cache_creation_input_tokens"))
                )

    def _hear(self, text: str) -> None:
        if self._received is not None:
            self._received.hear(text)

    def _start_block(self, index: int, block: _Json, weight: int) -> None:
        self._weight.add(weight)
        self._blocks[index] = dict(block)
        text = block.get("text")
        if type(text) is str and text:
            self._tap(text)
            self._hear(text)
        self.has_begun = True

    def _grow(self, index: int, delta: _Json, weight: int) -> None:
        kind = delta.get("type")
        block = self._blocks.get(index)
        if block is None:  # a server that leaves out the start of a block
            name = kind.removesuffix("_delta") if type(kind) is str else "text"
            block = self._blocks[index] = {"type": name}
            self._weight.add(_ENTRY_BYTES)
        self.has_begun = True
        if kind == "input_json_delta":
            text = delta.get("partial_json")
            if type(text) is str:
                self._inputs.setdefault(index, Parts()).append(text)
                self._hear(text)
                self._weight.add(len(text))
        elif kind == "citations_delta":
            self._weight.add(weight)
            known = block.get("citations")
            block["citations"] = [*(known if type(known) is list else []), delta.get("citation")]
        else:
            self._grow_texts(block, delta, weight)

    def _grow_texts(self, block: _Json, delta: _Json, weight: int) -> None:
        """Let what the delta names go on: `text`, `thinking`, `signature`."""
        for name, value in delta.items():
            if name == "type" or value is None:
                continue
            if type(value) is not str:
                self._weight.add(0 if name in block else weight)
                block[name] = value
                continue
            current = block.get(name)
            if type(current) is not Parts:
                current = block[name] = Parts([current] if type(current) is str else [])
            current.append(value)
            self._weight.add(len(value))
            if name != "signature":
                self._hear(value)
            if name == "text":
                self._tap(value)

    def _block(self, index: int) -> _Json:
        block = {
            name: "".join(value) if type(value) is Parts else value
            for name, value in self._blocks[index].items()
        }
        written = "".join(self._inputs.get(index, ()))
        if written:
            try:
                block["input"] = read_json(written.encode("utf-8", "surrogatepass"))
            except ValueError:
                block["partial_json"] = written  # cut off by max_tokens: `stop_reason` says so
        return block


def _object(data: _Json, name: str) -> _Json:
    value = data.get(name)
    if type(value) is not dict:
        raise bad_response(f"an event of the stream has no {name}")
    return value


def _index(data: _Json) -> int:
    index = data.get("index")
    if type(index) is not int:
        raise bad_response("a block in the stream has no number")
    return index
