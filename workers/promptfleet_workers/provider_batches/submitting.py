"""How a batch gets to its provider, once and never twice.

Before the provider is asked to make a batch, that is written down. When the reply is lost, with or
without the worker, nobody knows whether the batch was made: it is `unknown`, and looked for in the
provider's own list. Only what is not there, long enough after it was asked for, is asked for again.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import uuid
from collections.abc import AsyncIterator, Collection, Mapping, Sequence

from promptfleet_shared.errors import ProviderError
from promptfleet_shared.jobs import JobError
from promptfleet_shared.policies.provider_batches import BatchServiceSection
from promptfleet_shared.store import provider_batches as store
from promptfleet_shared.store.database import AsyncDatabase
from promptfleet_shared.store.provider_batches import NO_ROW, Held
from promptfleet_workers.provider_batches.lines import custom_id, key_of
from promptfleet_workers.provider_batches.returning import Returner
from promptfleet_workers.provider_batches.service import backoff_s
from promptfleet_workers.providers.batch_protocol import BatchApi, Line, Order, Search
from promptfleet_workers.retries import Verdict, classify

log = logging.getLogger(__name__)

PAGE = 500
"""Lines that are read, or marked, at a time."""
PATIENCE_S = 30.0
"""How long to insist on writing down what the provider has said."""
_SAID_NO = frozenset({503, 529})


class Submitter:
    """The steps from `preparing` to `submitted`."""

    def __init__(
        self,
        *,
        database: AsyncDatabase,
        options: BatchServiceSection,
        apis: Mapping[str, BatchApi],
        returner: Returner,
    ) -> None:
        """Ask nobody yet; `apis` are those of the deployments, by their names."""
        self._database = database
        self._options = options
        self._apis = apis
        self._returner = returner

    async def prepare(self, held: Held) -> None:
        """Settle which lines are sent, leave them with the provider, and have the batch made."""
        api = self._apis[held.deployment]
        sent = held.sent
        if held.file_id is None:
            marked = await self._mark(held)
            if not marked:
                if marked is not None:  # all were cancelled meanwhile
                    await self._database.run(lambda connection: store.end(connection, held))
                return
            sent = marked
        order = self._order(held, sent)
        whole = order if held.file_id is not None else await self._upload(api, held, order)
        if whole is not None:
            await self._create(api, held, whole)

    async def search(self, held: Held) -> None:
        """Look for a batch that the provider may have made."""
        api = self._apis[held.deployment]
        sighting = await api.find(self._search(held))
        if sighting.provider_id is not None:
            name = sighting.provider_id
            log.info("provider_batch_found", extra={"batch": str(held.id), "there": name})
            await self._database.run(
                lambda connection: store.note_submitted(connection, held, name, pause_s=0.0)
            )
            return
        if not await self._database.run(lambda connection: store.is_wanted(connection, held)):
            await self._database.run(lambda connection: store.end(connection, held))
            return
        settled_in_s = self._options.settle_s - (held.unknown_for_s or 0.0)
        if sighting.undecided or settled_in_s > 0:
            wait_s = self._options.poll_s if sighting.undecided else settled_in_s
            await self._database.run(lambda connection: store.pause(connection, held, wait_s))
            return
        log.info("provider_batch_was_not_made", extra={"batch": str(held.id)})
        await self._database.run(
            lambda connection: store.prepare_again(connection, held, pause_s=0.0)
        )

    async def _mark(self, held: Held) -> int | None:
        """How many lines are to be sent; None once the batch is somebody else's."""
        marked = 0
        after: uuid.UUID | None = NO_ROW
        while after is not None:
            page = await self._database.run(
                functools.partial(store.mark_lines, held=held, after=after, limit=PAGE)
            )
            if page is None:
                return None
            marked += page.marked
            after = page.last
        return marked

    def _order(self, held: Held, count: int) -> Order:
        async def lines() -> AsyncIterator[Sequence[Line]]:
            after = NO_ROW
            while True:
                page = await self._database.run(
                    functools.partial(store.sent_lines, held=held, after=after, limit=PAGE)
                )
                if page:
                    yield [Line(custom_id=custom_id(x.key), request=x.request) for x in page]
                if len(page) < PAGE:
                    return
                after = page[-1].key.job_id

        return Order(
            batch_id=held.id,
            kind=held.kind,
            model=held.model,
            count=count,
            lines=lines,
            file_id=held.file_id,
        )

    async def _upload(self, api: BatchApi, held: Held, order: Order) -> Order | None:
        """The order with its file; None if that was refused for good, or the batch is lost."""
        try:
            file_id = await api.upload(order)
        except ProviderError as error:
            if error.unknown_outcome or classify(error).otherwise is not Verdict.FINAL:
                raise  # uploading again costs nothing
            await self._returner.return_all(held, error)
            return None
        if file_id is None:
            return order
        name = file_id
        is_ours = await self._database.run(
            lambda connection: store.note_file(connection, held, name, sent=order.count)
        )
        return dataclasses.replace(order, file_id=file_id) if is_ours else None

    async def _create(self, api: BatchApi, held: Held, order: Order) -> None:
        is_ours = await self._database.run(
            lambda connection: store.begin_submitting(connection, held, sent=order.count)
        )
        if not is_ours:
            return
        try:
            name = await api.create(order)
        except ProviderError as error:
            await self._not_made(held, error)
            return
        facts = {"batch": str(held.id), "there": name, "lines": order.count}
        log.info("provider_batch_submitted", extra=facts)
        pause_s = self._options.poll_s
        is_noted = await self._database.insist(
            lambda connection: store.note_submitted(connection, held, name, pause_s=pause_s),
            patience_s=PATIENCE_S,
        )
        if not is_noted:
            # We stood still for so long that another worker took it for lost, and asked again.
            log.error("provider_batch_made_twice", extra=facts)
            await api.cancel(name)

    async def _not_made(self, held: Held, error: ProviderError) -> None:
        """The provider did not say that it made the batch: it may have, or surely has not."""
        facts = JobError(code=error.code, message=error.message, status=error.status)
        log.warning("provider_batch_refused", extra={"batch": str(held.id), "code": error.code})
        if may_have_been_made(error):
            # Looked for at once: usually it shows, or the list says that it does not.
            await self._database.insist(
                lambda connection: store.note_unknown(connection, held, pause_s=0.0),
                patience_s=PATIENCE_S,
            )
        elif classify(error).otherwise is Verdict.FINAL:
            await self._returner.return_all(held, error)
        else:
            wait_s = max(backoff_s(held.tries), error.retry_after_s or 0.0)
            await self._database.run(
                lambda connection: store.prepare_again(
                    connection, held, pause_s=wait_s, error=facts
                )
            )

    def _search(self, held: Held) -> Search:
        async def known(names: Collection[str]) -> set[str]:
            # Deployments that share an account see each other's batches.
            return await self._database.run(
                lambda connection: store.known_ids(connection, list(self._apis), list(names))
            )

        async def owns(text: str) -> bool:
            key = key_of(text)
            return key is not None and await self._database.run(
                lambda connection: store.owns_line(connection, held, key)
            )

        return Search(
            batch_id=held.id,
            file_id=held.file_id,
            count=held.sent,
            since=held.submitting_at or 0.0,
            known=known,
            owns=owns,
        )


def may_have_been_made(error: ProviderError) -> bool:
    """True unless the provider has said no, or nothing reached it."""
    if error.unknown_outcome:
        return True
    if error.status is None:
        return error.code != "connect_error"
    return error.status >= 500 and error.status not in _SAID_NO  # noqa: PLR2004 - HTTP's numbers
