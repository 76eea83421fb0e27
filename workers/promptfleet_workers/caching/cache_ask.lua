-- The value of each key, or whose turn it is to make one: one round trip.
-- A key without a value gets a marker, the lease of whoever is told to call: PREFIX, the holder's
-- name, and a * once somebody waits. A value that is set takes the marker's place.
-- KEYS: the keys. ARGV[1]: our marker. ARGV[2]: the lease in ms. ARGV[3]: the length of PREFIX.
-- Returns for each key its value, 1 (ours to call), or 2 (wait).
local mine, prefix = ARGV[1], string.sub(ARGV[1], 1, ARGV[3])
local replies = {}
for n, key in ipairs(KEYS) do
  local value = redis.call('GET', key)
  if not value then
    redis.call('SET', key, mine, 'PX', ARGV[2])
    replies[n] = 1
  elseif string.sub(value, 1, #prefix) ~= prefix then
    replies[n] = value
  elseif string.sub(value, 1, #mine) == mine then
    replies[n] = 1
  else
    if string.sub(value, -1) ~= '*' then
      local left = redis.call('PTTL', key)
      if left > 0 then redis.call('SET', key, value .. '*', 'PX', left) end
    end
    replies[n] = 2
  end
end
return replies
