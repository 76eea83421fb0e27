-- Keep values for a time, as MSET can't: one round trip, one reply.
-- KEYS: the keys. ARGV[1]: seconds to keep them. ARGV[1 + n]: the value of KEYS[n].
for n = 1, #KEYS do
  redis.call('SET', KEYS[n], ARGV[1 + n], 'EX', ARGV[1])
end
