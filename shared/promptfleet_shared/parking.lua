-- Where doorbells wait that a tier's short queue has no room for, and who is next: one round trip.
-- Tenants take turns by virtual time (start-time fair queueing, Goyal, Vin and Cheng 1996): each
-- job moves its tenant on by 1 / weight, and who is furthest behind is next. A tenant that comes
-- back begins where the others are, or where it was itself if that is later. Within a tenant the
-- lowest score is next: when the job was made (its id tells) less what its priority is worth, so
-- that whatever waits long enough comes first.
--
-- KEYS[1]: promptfleet:fair. Its other keys begin with that:
--   :config             hash: what fleet.toml says, written by the workers
--   :in:TENANT[\0KEY]   sorted set: jobs in flight that count for a bound, by when their hold ends
--   :hold:ID            string: the tenant and key whose bounds a job in flight counts for
--   :wait:TENANT[\0KEY] set: queues where somebody waits for that bound
-- For a queue, after its name:
--   :parked             how many jobs wait
--   :workers            sorted set: who takes from it, by when they were seen
--   :blocked            sorted set: tenants and keys at their bound, by when to look again
-- For a pool of it, b for all jobs and u for those that may use the interactive reserve:
--   :q:TENANT[\0KEY]    sorted set: ids by score
--   :f:TENANT           sorted set: its keys that have jobs and are not at their bound, by score
--   :active, :idle      sorted sets: tenants by virtual time, with jobs that may run and without
--   :now                the virtual time
--
-- ARGV: 1 the queue, 2 the worker that asks or '', 3 '1' to empty the place, 4 how many jobs are
-- held, 5 how many are let go, 6 how many groups are parked, 7 a message as doorbell_message.py
-- makes it, 8 a UUID for the first of them, 9 and 10 the lists of urgent and of other messages; then
-- triples of id, tenant and key, ids, and groups of tenant, key, priority, how many, and ids.
-- Returns the configuration's id ('off' where fairness is off), jobs parked, tenants whose jobs may
-- run, bounds that are reached, and how many messages went to the queue.
local root, queue, worker, drain = KEYS[1], ARGV[1], ARGV[2], ARGV[3] == '1'
local at = root .. ':' .. queue
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local HOLD_MS = 60000      -- a job in flight counts for so long unless its worker speaks for it
local OLD_MS = 15000       -- a message is claimed before, or lost
local SETTLE_MS = 2000     -- after a loss, until all workers have said what they hold
local SEEN_MS = 5000       -- a worker takes messages until it was not seen for so long
local RECHECK_MS = 1000    -- bounds are looked at again, for holds that ended in silence
local STEPS = 8            -- of priority, each a list of Celery's
local URGENT_STEPS = 2     -- the first of them
local SOME = 500           -- arguments of one call, at most
local SHOWN = 10           -- ids that Flower shows of a message

local config = setmetatable({}, {__index = function(known, field)
  local value = redis.call('HGET', root .. ':config', field)
  known[field] = value
  return value
end})
local ageing_ms = tonumber(config.ageing_ms or 60000)
local urgent_from = tonumber(config.urgent_from)
local bounded = config.bounded == '1'
local settled = now - tonumber(config.since or 0) >= SETTLE_MS

local function bound_of_tenant(tenant)
  return tonumber(config['t:' .. tenant] or config.t)
end

local function bound_of_key(key)
  local group = string.match(key, '^[^:]*') .. ':*'
  return tonumber(config['k:' .. key] or config['k:' .. group] or config.k)
end

local function flow_of(tenant, key)
  return key == '' and tenant or tenant .. '\0' .. key
end

-- How many more jobs of this flow may be in flight.
local function room_of(flow, bound)
  if not bound then return math.huge end
  if not settled then return 0 end
  local held = root .. ':in:' .. flow
  redis.call('ZREMRANGEBYSCORE', held, '-inf', now)
  return bound - redis.call('ZCARD', held)
end

local function hold(id, tenant, key)
  local until_ms, held = now + HOLD_MS, false
  if bound_of_tenant(tenant) then
    redis.call('ZADD', root .. ':in:' .. tenant, until_ms, id)
    held = true
  end
  if key ~= '' and bound_of_key(key) then
    redis.call('ZADD', root .. ':in:' .. flow_of(tenant, key), until_ms, id)
    held = true
  end
  if held then redis.call('SET', root .. ':hold:' .. id, tenant .. '\0' .. key, 'PX', HOLD_MS) end
end

local function wake(flow)
  local waiting = root .. ':wait:' .. flow
  for _, place in ipairs(redis.call('SMEMBERS', waiting)) do
    redis.call('ZADD', place .. ':blocked', 'XX', 0, 'b\0' .. flow)
    redis.call('ZADD', place .. ':blocked', 'XX', 0, 'u\0' .. flow)
  end
  redis.call('DEL', waiting)
end

-- The job is not in flight. Who is rung for is not, either, unless it was sent a moment ago: then
-- its message is still under way.
local function let_go(id, age_ms)
  local held = redis.call('GET', root .. ':hold:' .. id)
  if not held then return end
  if age_ms and redis.call('PTTL', root .. ':hold:' .. id) > HOLD_MS - age_ms then return end
  redis.call('DEL', root .. ':hold:' .. id)
  local tenant, key = string.match(held, '^([^%z]*)%z(.*)$')
  redis.call('ZREM', root .. ':in:' .. tenant, id)
  wake(tenant)
  if key ~= '' then
    redis.call('ZREM', root .. ':in:' .. held, id)
    wake(held)
  end
end

local function activate(pool, tenant)
  local active = at .. pool .. ':active'
  if redis.call('ZSCORE', active, tenant) then return end
  local idle = at .. pool .. ':idle'
  local mine = tonumber(redis.call('ZSCORE', idle, tenant) or 0)
  local theirs = tonumber(redis.call('GET', at .. pool .. ':now') or 0)
  redis.call('ZADD', active, string.format('%.17g', math.max(mine, theirs)), tenant)
  redis.call('ZREM', idle, tenant)
end

-- A flow with a key is asked for by its first job.
local function show_key(pool, tenant, key)
  local head = redis.call('ZRANGE', at .. pool .. ':q:' .. flow_of(tenant, key), 0, 0, 'WITHSCORES')
  if head[1] then
    redis.call('ZADD', at .. pool .. ':f:' .. tenant, head[2], key)
  else
    redis.call('ZREM', at .. pool .. ':f:' .. tenant, key)
  end
  return head[1]
end

local function park(pool, tenant, key, priority, first, last)
  local place, added = at .. pool .. ':q:' .. flow_of(tenant, key), 0
  for from = first, last, SOME / 2 do
    local pairs_ = {}
    for n = from, math.min(last, from + SOME / 2 - 1) do
      local id = ARGV[n]
      local made = tonumber(string.sub(id, 1, 8) .. string.sub(id, 10, 13), 16) or now
      pairs_[#pairs_ + 1] = string.format('%.0f', made - priority * ageing_ms)
      pairs_[#pairs_ + 1] = id
    end
    added = added + redis.call('ZADD', place, 'NX', unpack(pairs_))
  end
  if key ~= '' then show_key(pool, tenant, key) end
  activate(pool, tenant)
  return added
end

local function block(pool, place, tenant, key)
  local flow = flow_of(tenant, key)
  redis.call('ZADD', at .. ':blocked', now + RECHECK_MS, pool .. '\0' .. flow)
  redis.call('SADD', root .. ':wait:' .. flow, at)
end

local function unblock()
  local due = redis.call('ZRANGEBYSCORE', at .. ':blocked', '-inf', now, 'LIMIT', 0, SOME)
  for _, entry in ipairs(due) do
    redis.call('ZREM', at .. ':blocked', entry)
    local pool, flow = string.match(entry, '^(.)%z(.*)$')
    local tenant, key = string.match(flow, '^([^%z]*)%z?(.*)$')
    if key == '' or show_key(':' .. pool, tenant, key) then activate(':' .. pool, tenant) end
  end
end

-- These jobs leave the place: also the other pool, if they may be there.
local function leave(pool, tenant, key, ids)
  if #ids == 0 then return end
  local gone = #ids
  if urgent_from then
    local other, there = pool == ':b' and ':u' or ':b', 0
    for from = 1, #ids, SOME do
      local some = {unpack(ids, from, math.min(#ids, from + SOME - 1))}
      there = there + redis.call('ZREM', at .. other .. ':q:' .. flow_of(tenant, key), unpack(some))
    end
    if pool == ':u' then gone = there end
  end
  redis.call('DECRBY', at .. ':parked', gone)
  if bounded then
    for _, id in ipairs(ids) do hold(id, tenant, key) end
  end
end

-- Up to `most` jobs of a flow without keys.
local function pop(pool, tenant, key, most)
  local popped, ids = redis.call('ZPOPMIN', at .. pool .. ':q:' .. flow_of(tenant, key), most), {}
  for n = 1, #popped, 2 do ids[#ids + 1] = popped[n] end
  leave(pool, tenant, key, ids)
  return ids
end

-- Up to `most` jobs of a tenant, those with keys included; and whether it may have more.
local function pop_of(pool, tenant, most)
  local plain, keyed = at .. pool .. ':q:' .. tenant, at .. pool .. ':f:' .. tenant
  local room = bounded and room_of(tenant, bound_of_tenant(tenant)) or math.huge
  if room <= 0 then
    block(string.sub(pool, 2), at, tenant, '')
    return {}, false
  end
  most = math.min(most, room)
  if redis.call('EXISTS', keyed) == 0 then
    return pop(pool, tenant, '', most), redis.call('EXISTS', plain) == 1
  end
  local ids = {}
  for _ = 1, most + redis.call('ZCARD', keyed) do -- each finds a job, or a key at its bound
    if #ids >= most then break end
    local mine = redis.call('ZRANGE', plain, 0, 0, 'WITHSCORES')
    local theirs = redis.call('ZRANGE', keyed, 0, 0, 'WITHSCORES')
    if not mine[1] and not theirs[1] then break end
    if not theirs[1] or mine[1] and tonumber(mine[2]) <= tonumber(theirs[2]) then
      ids[#ids + 1] = pop(pool, tenant, '', 1)[1]
    elseif bounded and room_of(flow_of(tenant, theirs[1]), bound_of_key(theirs[1])) <= 0 then
      redis.call('ZREM', keyed, theirs[1])
      block(string.sub(pool, 2), at, tenant, theirs[1])
    else
      ids[#ids + 1] = pop(pool, tenant, theirs[1], 1)[1]
      show_key(pool, tenant, theirs[1])
    end
  end
  return ids, redis.call('EXISTS', plain) + redis.call('EXISTS', keyed) > 0
end

-- The next message: up to `most` jobs in the order of their tenants' virtual times.
local function take(pool, most)
  local active, ids = at .. pool .. ':active', {}
  for _ = 1, most + redis.call('ZCARD', active) do -- each finds jobs, or a tenant that has none
    if #ids >= most then break end
    local first = redis.call('ZRANGE', active, 0, 1, 'WITHSCORES')
    local tenant, start = first[1], tonumber(first[2])
    if not tenant then break end
    local weight = tonumber(config['w:' .. tenant] or 1)
    local many = most - #ids
    if first[4] then
      many = math.min(many, math.max(1, math.floor((tonumber(first[4]) - start) * weight)))
    end
    local popped, more = pop_of(pool, tenant, many)
    if #popped > 0 then redis.call('SET', at .. pool .. ':now', first[2]) end
    for _, id in ipairs(popped) do ids[#ids + 1] = id end
    local next_start = string.format('%.17g', start + #popped / weight)
    if more then
      redis.call('ZADD', active, next_start, tenant)
    else
      redis.call('ZREM', active, tenant)
      redis.call('ZADD', at .. pool .. ':idle', next_start, tenant)
    end
  end
  return ids
end

local function forget_the_past(pool)
  local idle = at .. pool .. ':idle'
  if redis.call('GET', at .. ':parked') == '0' then
    redis.call('DEL', at .. pool .. ':active', idle, at .. pool .. ':now')
  else
    redis.call('ZREMRANGEBYSCORE', idle, '-inf', redis.call('GET', at .. pool .. ':now') or 0)
  end
end

local function length(first, last)
  local count = 0
  for step = first, last do
    count = count + redis.call('LLEN', step == 0 and queue or queue .. '\6\22' .. step)
  end
  return count
end

-- How many messages the queue, or the urgent part of it, has room for: one for two workers, since
-- each of them has one at hand that it has not claimed yet.
local function room_in_queue(pool)
  if drain then return 100 end
  local room = math.max(1, math.ceil(redis.call('ZCARD', at .. ':workers') / 2))
  if pool == ':u' then return room - length(0, URGENT_STEPS - 1) end
  return room - length(urgent_from and URGENT_STEPS or 0, STEPS - 1)
end

local sent = 0

-- Put a message into the queue, as Celery would. Its id is that of this call, counted on.
local function send(pool, tenants, ids)
  local step = tonumber(pool == ':u' and ARGV[9] or ARGV[10])
  local why = pool == ':u' and ',"reserve":true' or ''
  why = (tenants > 1 or why ~= '') and ',{"tenants":' .. tenants .. why .. '}' or ''
  local arguments = '[["' .. table.concat(ids, '","') .. '"]' .. why .. ']'
  local shown = table.concat(ids, ', ', 1, math.min(#ids, SHOWN)) .. (#ids > SHOWN and ', ...' or '')
  local values = {
    ['@task@'] = string.sub(ARGV[8], 1, -5) .. string.format('%04x', sent),
    ['"@step@"'] = step,
    ['\\"@args@\\"'] = string.gsub(arguments, '"', '\\"'),
    ['@shown@'] = '[' .. shown .. ']',
  }
  local message = ARGV[7]
  for mark, value in pairs(values) do
    message = string.gsub(message, mark, function() return value end)
  end
  redis.call('LPUSH', step == 0 and queue or queue .. '\6\22' .. step, message)
  sent = sent + 1
end

if worker ~= '' and not drain then redis.call('ZADD', at .. ':workers', now, worker) end
redis.call('ZREMRANGEBYSCORE', at .. ':workers', '-inf', now - SEEN_MS)

local n = 11
for _ = 1, tonumber(ARGV[4]) do
  hold(ARGV[n], ARGV[n + 1], ARGV[n + 2])
  n = n + 3
end
for _ = 1, tonumber(ARGV[5]) do -- after them: what ended meanwhile is not held again
  let_go(ARGV[n])
  n = n + 1
end
if config.off == '1' and not drain then return {'off', 0, 0, 0, 0} end
local added = 0
for _ = 1, tonumber(ARGV[6]) do
  local tenant, key, priority, count = ARGV[n], ARGV[n + 1], tonumber(ARGV[n + 2]), tonumber(ARGV[n + 3])
  local first, last = n + 4, n + 3 + count
  added = added + park(':b', tenant, key, priority, first, last)
  if urgent_from and priority >= urgent_from then park(':u', tenant, key, priority, first, last) end
  if bounded then
    for each = first, last do let_go(ARGV[each], OLD_MS) end
  end
  n = last + 1
end

local parked = tonumber(redis.call('INCRBY', at .. ':parked', added))
if config.id and parked > 0 or drain then
  unblock()
  local most = tonumber(config['chunk:' .. queue] or 100)
  for _, pool in ipairs(urgent_from and {':u', ':b'} or {':b'}) do
    for _ = 1, room_in_queue(pool) do
      local tenants = redis.call('ZCARD', at .. pool .. ':active')
      if tenants == 0 then break end
      local ids = take(pool, most)
      if #ids == 0 then break end
      send(pool, tenants, ids)
    end
    forget_the_past(pool)
  end
end
return {
  config.id or '', tonumber(redis.call('GET', at .. ':parked')),
  redis.call('ZCARD', at .. ':b:active'), redis.call('ZCARD', at .. ':blocked'), sent,
}
