-- Budgets of the whole fleet: reserve, settle, announce and seed, each in one round trip.
-- Only the server's clock counts. Money is in whole nanodollars. Postgres' ledger is the truth: a
-- counter that is not known here, or whose period is over, is seeded from there before it lets
-- anything through.
-- KEYS[1]: promptfleet:{budgets}:home, a string; not there: this server has lost its data.
-- KEYS[2..]: for each counter two keys: promptfleet:{budgets}:spent:…, a hash (period, its start;
--   spent; held, the sum of what is reserved; stale, 1 if the ledger is to be asked; late, what was
--   settled since somebody began to ask it; told, 1 once somebody heard of the soft limit), and
--   promptfleet:{budgets}:held:…, a sorted set of reservations by when they lapse; a member is
--   amount:job:fence, or more of a name behind it.
-- ARGV[1]: JSON {act, quiet_ms, hold_ms, counters: [{period, hard, soft}], …} and by act:
--   reserve:  jobs: [{id, wants: [{counter, amount}]}]: all or nothing for each of them.
--   settle:   ends: [{id, reserved: [{counter, amount}], spent: [{counter, amount}]}].
--   announce: jobs as for reserve: what is still held, whatever the server knows. One that has
--             a hold_ms of its own, a line of a provider's batch, has no worker that says so.
--   seed:     seeds: [{counter, period, spent}].
--   told:     somebody has heard that these counters are beyond their soft limits.
-- Returns JSON {verdicts, soft, unseeded, left_ms}: see budgets.py.
local order = cjson.decode(ARGV[1])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local today = math.floor(time[1] / 86400)

-- Civil dates: https://howardhinnant.github.io/date_algorithms.html, civil_from_days.
local function civil(days)
  local z = days + 719468
  local era = math.floor(z / 146097)
  local doe = z - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524)
    - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  return doy - math.floor((153 * mp + 2) / 5) + 1, mp < 10 and mp + 3 or mp - 9, yoe + era * 400
end

-- When the present period began, and when it is over (false: never), in seconds since 1970.
local function bounds(period)
  if period == 'total' then return 0, false end
  if period == 'day' then return today * 86400, (today + 1) * 86400 end
  local day, month, year = civil(today)
  local first = today - day + 1
  if month <= 2 then year = year + 1 end
  local days = {31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31}
  local leap = year % 4 == 0 and (year % 100 ~= 0 or year % 400 == 0)
  local length = month == 2 and leap and 29 or days[month]
  return first * 86400, (first + length) * 86400
end

local function whole(number) return string.format('%.0f', number) end

-- A server that has just come, or come back empty: others may hold what it does not know of, and
-- say so within quiet_ms. Until then nothing is let through.
local home = redis.call('GET', KEYS[1])
if not home then
  home = whole(now)
  redis.call('SET', KEYS[1], home)
end
local quiet = now - tonumber(home) < order.quiet_ms

local counters = {}
for n, given in ipairs(order.counters) do
  local spent_key, held_key = KEYS[2 * n], KEYS[2 * n + 1]
  local start, over = bounds(given.period)
  local found = redis.call('HMGET', spent_key, 'period', 'spent', 'stale', 'told', 'held', 'late')
  local c = {
    spent_key = spent_key, held_key = held_key, start = start, over = over,
    hard = given.hard, soft = given.soft, spent = tonumber(found[2]) or 0,
    known = found[1] == whole(start), stale = found[3] == '1', told = found[4] == '1',
    held = tonumber(found[5]) or 0, late = tonumber(found[6]),
  }
  -- What nobody holds any more was not settled: the ledger knows what became of it.
  local lapsed = redis.call('ZRANGEBYSCORE', held_key, '-inf', whole(now))
  if #lapsed > 0 then
    for _, member in ipairs(lapsed) do
      redis.call('ZREM', held_key, member)
      c.held = c.held - tonumber(member:match('^%d+'))
    end
    c.stale = true
    redis.call('HSET', spent_key, 'stale', '1', 'held', whole(c.held))
  end
  counters[n] = c
end

local function keep(c)
  -- Longer than any reservation, and than the period may still last.
  local ms = whole(c.over and (c.over * 1000 - now) + 86400000 or 400 * 86400000)
  redis.call('PEXPIRE', c.spent_key, ms)
  redis.call('PEXPIRE', c.held_key, ms)
end

local function hold(job)
  for _, want in ipairs(job.wants) do
    local c = counters[want.counter]
    local member = whole(want.amount) .. ':' .. job.id
    local lapses = whole(now + (job.hold_ms or order.hold_ms))
    if redis.call('ZADD', c.held_key, 'GT', lapses, member) == 1 then
      c.held = c.held + want.amount
      redis.call('HSET', c.spent_key, 'held', whole(c.held))
      keep(c)
    end
  end
end

local function judge(job)
  for _, want in ipairs(job.wants) do
    local c = counters[want.counter]
    if c.hard then
      if not c.known or c.stale then return {'unseeded', want.counter} end
      if quiet then return {'quiet', want.counter} end
      if c.spent + want.amount > c.hard then return {'spent', want.counter} end
      if c.spent + c.held + want.amount > c.hard then return {'held', want.counter} end
    end
  end
  hold(job)
  return {'ok', 0}
end

local verdicts = {}
if order.act == 'reserve' then
  for n, job in ipairs(order.jobs) do verdicts[n] = judge(job) end
elseif order.act == 'announce' then
  for _, job in ipairs(order.jobs) do hold(job) end
elseif order.act == 'settle' then
  for _, job in ipairs(order.ends) do
    for _, part in ipairs(job.reserved) do
      local c = counters[part.counter]
      if redis.call('ZREM', c.held_key, whole(part.amount) .. ':' .. job.id) == 1 then
        c.held = c.held - part.amount
        redis.call('HSET', c.spent_key, 'held', whole(c.held))
      end
    end
    for _, part in ipairs(job.spent) do
      local c = counters[part.counter]
      if c.known then -- else the ledger is asked after this
        c.spent = c.spent + part.amount
        redis.call('HSET', c.spent_key, 'spent', whole(c.spent))
      end
      if c.late then -- who asks the ledger just now may not see it there
        c.late = c.late + part.amount
        redis.call('HSET', c.spent_key, 'late', whole(c.late))
      end
    end
  end
elseif order.act == 'seed' then
  for _, seed in ipairs(order.seeds) do
    local c = counters[seed.counter]
    if seed.period == c.start and (not c.known or c.stale) then
      -- What was settled since the ledger was read must not be lost.
      local spent = seed.spent + (c.late or 0)
      c.spent = c.known and math.max(c.spent, spent) or spent
      redis.call('HSET', c.spent_key, 'period', whole(c.start), 'spent', whole(c.spent))
      redis.call('HDEL', c.spent_key, 'stale', 'late')
      if not c.known then redis.call('HDEL', c.spent_key, 'told') end
      c.known, c.stale, c.told = true, false, c.known and c.told
      keep(c)
    end
  end
elseif order.act == 'told' then
  for _, c in ipairs(counters) do redis.call('HSET', c.spent_key, 'told', '1') end
end

local soft, unseeded, left = {}, {}, {}
for n, c in ipairs(counters) do
  if c.soft and c.known and not c.told and c.spent >= c.soft then
    soft[#soft + 1] = {n, whole(c.spent), whole(c.start)}
  end
  if not c.known or c.stale then
    unseeded[#unseeded + 1] = n
    if order.act == 'reserve' and not c.late then
      redis.call('HSET', c.spent_key, 'late', '0')
      keep(c)
    end
  end
  left[n] = c.over and c.over * 1000 - now or -1
end
return cjson.encode({
  verdicts = verdicts, soft = soft, unseeded = unseeded, left_ms = left,
  quiet_ms = quiet and tonumber(home) + order.quiet_ms - now or 0,
})
