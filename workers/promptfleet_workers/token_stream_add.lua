-- Add an entry to each of many token streams, in one round trip.
-- A stream shows its newest take only: an older one's entries go when a newer one begins, and what
-- comes of an older one later is refused. So a worker that lost its claim can't mix in its text.
-- KEYS: the streams, as token_stream.py names them. ARGV[1]: entries that a stream may have.
-- Then six for each key: the take's fence and call, characters before the text, the text, the state
-- that the job ended in or '', and the seconds to keep the stream.
-- Returns for each key 1 if the entry was added, 0 if it was refused.
local replies = {}
for n = 1, #KEYS do
  local key, first = KEYS[n], 6 * n - 4
  local fence, call = tonumber(ARGV[first]), tonumber(ARGV[first + 1])
  local last = redis.call('XREVRANGE', key, '+', '-', 'COUNT', 1)[1]
  local order = 0 -- of the last entry's take and this one: 1 if the last one's is newer
  if last then
    local its_fence, its_call = tonumber(last[2][2]), tonumber(last[2][4])
    if its_fence ~= fence then
      order = its_fence > fence and 1 or -1
    elseif its_call ~= call then
      order = its_call > call and 1 or -1
    end
  end
  if order > 0 then
    replies[n] = 0
  else
    if order < 0 then redis.call('XTRIM', key, 'MAXLEN', 0) end
    redis.call('XADD', key, 'MAXLEN', '~', ARGV[1], '*', 'f', ARGV[first], 'c', ARGV[first + 1],
      'a', ARGV[first + 2], 't', ARGV[first + 3], 's', ARGV[first + 4])
    redis.call('EXPIRE', key, ARGV[first + 5])
    replies[n] = 1
  end
end
return replies
