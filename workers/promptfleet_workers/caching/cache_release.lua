-- End leases without a value, or keep them: only those that are ours.
-- KEYS: the keys. ARGV[1]: our marker, see cache_ask.lua. ARGV[2]: the channel. ARGV[3]: how many
-- ms from now the leases are to last; 0 to end them.
local awaited = {}
for _, key in ipairs(KEYS) do
  local marker = redis.call('GETRANGE', key, 0, 127)
  if string.sub(marker, 1, #ARGV[1]) == ARGV[1] then
    if ARGV[3] ~= '0' then
      redis.call('PEXPIRE', key, ARGV[3])
    else
      redis.call('DEL', key)
      if string.sub(marker, -1) == '*' then awaited[#awaited + 1] = key end
    end
  end
end
if #awaited > 0 then redis.call('PUBLISH', ARGV[2], table.concat(awaited, ' ')) end
