-- The fleet's loads: swap what one worker has in flight at each deployment for everybody's sum.
-- Costs the same however many workers there are. Only the server's clock counts; times that leave
-- or enter are durations in milliseconds.
-- KEYS[1]: when each worker was heard last, a sorted set; KEYS[2]: what it said then, a hash;
-- KEYS[3]: jobs in flight, a hash by deployment; KEYS[4]: latency and rest, a hash by deployment.
-- ARGV[1]: the worker; ARGV[2]: milliseconds after which a silent worker's load is forgotten;
-- ARGV[3]: [[name, in flight, peak, mean, rest, decay], ...] as JSON, of all deployments.
-- Returns [[in flight, latency, rest], ...] in the same order, as JSON.
local worker, lease_ms, reports = ARGV[1], tonumber(ARGV[2]), cjson.decode(ARGV[3])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local KEEP_MS = 600000  -- a fleet that asks no more

local function whole(number) return string.format('%.0f', number) end

-- Take a worker's load out of the sums.
local function take_out(name)
  local said = redis.call('HGET', KEYS[2], name)
  for deployment, jobs in pairs(said and cjson.decode(said) or {}) do
    local left = redis.call('HINCRBY', KEYS[3], deployment, whole(-jobs))
    if left <= 0 then redis.call('HDEL', KEYS[3], deployment) end
  end
  redis.call('HDEL', KEYS[2], name)
  redis.call('ZREM', KEYS[1], name)
end

take_out(worker)
for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', whole(now - lease_ms))) do
  take_out(name)
end

-- A peak counts at once, and is forgotten with time: as in places.py.
local function latency(said, report)
  local cost, peak, mean = said[1], report[3], report[4]
  local weight = math.exp(-math.max(0, now - said[2]) / report[6])
  if peak <= 0 then return cost * weight end
  if peak > cost then return peak end
  return cost * weight + mean * (1 - weight)
end

local load, any, views = {}, false, {}
for n, report in ipairs(reports) do
  local name, jobs = report[1], report[2]
  local total = tonumber(redis.call('HGET', KEYS[3], name) or 0)
  if jobs > 0 then
    load[name], any = jobs, true
    total = redis.call('HINCRBY', KEYS[3], name, whole(jobs))
  end
  local stored = redis.call('HGET', KEYS[4], name)
  local said = stored and cjson.decode(stored) or {0, now, 0}
  local cost = latency(said, report)
  local rest_until = math.max(said[3], now + report[5])
  if report[3] > 0 or (report[5] > 0 and rest_until > said[3]) then
    redis.call('HSET', KEYS[4], name, cjson.encode({cost, now, rest_until}))
  end
  views[n] = {total, cost, math.max(0, rest_until - now)}
end
if any then
  redis.call('HSET', KEYS[2], worker, cjson.encode(load))
  redis.call('ZADD', KEYS[1], whole(now), worker)
end
for _, key in ipairs(KEYS) do redis.call('PEXPIRE', key, KEEP_MS) end
return cjson.encode(views)
