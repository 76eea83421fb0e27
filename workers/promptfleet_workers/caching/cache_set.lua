-- Keep values for a time, as MSET can't, and tell who waits for them: one round trip.
-- KEYS: the keys. ARGV[1]: seconds to keep them. ARGV[2]: PREFIX, see cache_ask.lua. ARGV[3]: the
-- channel. ARGV[3 + n]: the value of KEYS[n].
local awaited = {}
for n, key in ipairs(KEYS) do
  local marker = redis.call('GETRANGE', key, 0, 127)
  if string.sub(marker, 1, #ARGV[2]) == ARGV[2] and string.sub(marker, -1) == '*' then
    awaited[#awaited + 1] = key
  end
  redis.call('SET', key, ARGV[3 + n], 'EX', ARGV[1])
end
if #awaited > 0 then redis.call('PUBLISH', ARGV[3], table.concat(awaited, ' ')) end
