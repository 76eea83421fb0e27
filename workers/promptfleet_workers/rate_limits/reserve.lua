-- The fleet's rate limits: settle what ended, then reserve for a batch of calls, each of them with
-- all of its keys or with none. Only the server's clock counts; times that leave or enter are
-- durations in microseconds.
--
-- KEYS[1]: promptfleet:{limits}:workers, a sorted set of the workers seen of late
-- KEYS[n]: promptfleet:{limits}:..., each of one kind, as ARGV[1].keys[n - 1] says:
--   rate     hash: at (when the next call is due, GCRA), line (end of the queue of those that wait
--            elsewhere), again (the same for those that came back too early), told (a limit that
--            the provider told), till (when that is forgotten; 0: never)
--   window   hash: what was used in each sixtieth of the period, by its number; line; known, where
--            windows are kept elsewhere, too: 1 once this server has been told what was used before
--   permits  sorted set: calls in flight by when their leases end
--   health   hash: pause (until when nobody calls), factor, at (when that was), and for adaptive
--            concurrency: width, steady, cut
-- KEYS[last], if ask.kept: promptfleet:{limits}:changed, a sorted set: the windows that were changed
--   since they were last kept elsewhere, by when; a member is a tenant (or nothing), a NUL and a key
-- ARGV[1]: JSON, as exchange.py writes it.
-- Returns {workers seen, this one's place among them, then for each call: verdict, wait, the number
--   of the key that decided}; verdict 0: go after the wait, 1: come again after it, 2: too many are
--   in flight, 3: what was used of a window is not known here.
local ask = cjson.decode(ARGV[1])
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]

local GO, LATER, BUSY, UNKNOWN = 0, 1, 2, 3
local PIECES = 60
local SEEN_US = 30000000      -- a worker that has not asked for so long is gone
local RECOVER = 0.005         -- of the limit comes back each second after a refusal
local SHRINK, FLOOR = 0.95, 0.05
local SHRINK_US = 500000      -- refusals within so long are one
local CUT, CUT_US = 0.7, 1000000
local FIRST_WIDTH, MAX_WIDTH = 8, 10000
local KEEP_US = 600000000     -- states are kept for as long beyond their use
local EARLY = 0.75            -- of the patience: so much before its turn a call comes back
-- Who waits elsewhere is called back faster than the limit allows, for costs may turn out smaller;
-- those who come too early wait in a second, shorter queue, whose times are up to date.
local HURRY = {line = 1.25, again = 1.03}
local IDLE = 0.25             -- of the patience: a queue this short leaves room for newcomers

local states = {}

local function whole(number) return string.format('%.0f', number) end

local function load(n)
  local state = states[n]
  if state then return state end
  local key = KEYS[n + 1]
  local kind = ask.keys[n].kind
  state = {}
  if kind == 'permits' then
    redis.call('ZREMRANGEBYSCORE', key, '-inf', whole(now))
    state.used = redis.call('ZCARD', key)
  else
    local fields = redis.call('HGETALL', key)
    for i = 1, #fields, 2 do state[fields[i]] = tonumber(fields[i + 1]) end
  end
  states[n] = state
  return state
end

local function touch(n) load(n).changed = true end

-- -- a deployment's health -----------------------------------------------------------------

local function factor(n)
  local health = load(n)
  if not health.factor then return 1 end
  return math.min(1, health.factor + RECOVER * (now - health.at) / 1000000)
end

local function width(n)
  return load(n).width or FIRST_WIDTH
end

local function refused(n, pause)
  local health = load(n)
  health.pause = math.max(health.pause or 0, now + pause)
  if not health.at or now - health.at >= SHRINK_US then
    health.factor, health.at = math.max(FLOOR, factor(n) * SHRINK), now
  end
  touch(n)
end

-- TCP's way: doubled until the first trouble, then one more each round, cut after each trouble.
local function adapt(n, ok, used)
  local health = load(n)
  local old = width(n)
  if not ok then
    if now - (health.cut or 0) < CUT_US then return end
    health.width, health.cut, health.steady = math.max(1, old * CUT), now, 1
  elseif used >= math.floor(old) * 0.8 then  -- what is not used proves nothing
    health.width = math.min(MAX_WIDTH, old + (health.steady and 1 / old or 1))
  else
    return
  end
  touch(n)
end

-- -- rates ---------------------------------------------------------------------------------

-- The limit of a rate, and the microseconds that one unit of it takes; nil where none is known.
local function rate(n)
  local key = ask.keys[n]
  local told, till = load(n).told, load(n).till
  if till and till > 0 and till < now then told = nil end
  local limit = key.limit or told
  if not limit then return nil end
  if told and told < limit then limit = told end
  local unit = key.period * (1 + ask.headroom) / limit
  if key.health then unit = unit / factor(key.health) end
  return limit, unit
end

local function due(n)
  local burst = ask.keys[n].period * ask.headroom / 4
  return math.max(load(n).at or 0, now - burst)
end

-- -- windows -------------------------------------------------------------------------------

local function piece_of(n) return math.floor(now * PIECES / ask.keys[n].period) end

local function used_in(n)
  local state = load(n)
  if not state.pieces then
    state.pieces, state.used, state.gone = {}, 0, {}
    local oldest = piece_of(n) - PIECES
    for name, value in pairs(state) do
      local piece = tonumber(name)
      if piece and piece >= oldest then
        state.pieces[piece] = value
        state.used = state.used + value
      elseif piece then
        state.gone[#state.gone + 1] = name
      end
    end
  end
  return state.used
end

local function spend(n, cost)
  local state = load(n)
  used_in(n)
  local piece = piece_of(n)
  state.pieces[piece] = (state.pieces[piece] or 0) + cost
  state.used = state.used + cost
  touch(n)
end

-- Until so much of what was used is older than the period.
local function room_in(n, cost)
  local state, key = load(n), ask.keys[n]
  local missing = used_in(n) + cost - key.limit
  local last = piece_of(n)
  for piece = last - PIECES, last do
    missing = missing - (state.pieces[piece] or 0)
    if missing <= 0 then return (piece + PIECES + 1) * key.period / PIECES end
  end
  return now + key.period
end

-- What was used before this server lost it, besides what has been settled here since. Another
-- server's clock may have been ahead of this one's.
local function recall(n, pieces)
  local state, newest = load(n), piece_of(n)
  if state.known then return end
  used_in(n)
  for _, each in ipairs(pieces) do
    local piece, used = math.min(each[1], newest), each[2]
    if piece >= newest - PIECES then
      state.pieces[piece] = (state.pieces[piece] or 0) + used
      state.used = state.used + used
    end
  end
  state.known, state.recalled = 1, true
  touch(n)
end

-- -- settle --------------------------------------------------------------------------------

for _, each in ipairs(ask.recalled or {}) do recall(each[1], each[2]) end
for _, each in ipairs(ask.told) do
  local state = load(each[1])
  state.told, state.till = each[2], each[3] > 0 and now + each[3] or 0
  touch(each[1])
end
for _, each in ipairs(ask.refusals) do refused(each[1], each[2]) end
for _, each in ipairs(ask.outcomes) do
  adapt(each[1], each[3], load(each[2]).used)
end
for _, each in ipairs(ask.settled) do
  local n, difference = each[1], each[2]
  if ask.keys[n].kind == 'window' then
    spend(n, difference)
  elseif load(n).at then
    local limit, unit = rate(n)
    if limit then
      local state = load(n)
      state.at = state.at + difference * unit
      touch(n)
    end
  end
end
for _, each in ipairs(ask.returned) do
  local state = load(each[1])
  state.used = state.used - redis.call('ZREM', KEYS[each[1] + 1], each[2])
end
for _, each in ipairs(ask.renewed) do
  redis.call('ZADD', KEYS[each[1] + 1], whole(now + ask.lease), each[2])
end

-- -- reserve -------------------------------------------------------------------------------

local function cap(n)
  local key = ask.keys[n]
  local most = key.limit or MAX_WIDTH
  if key.adaptive then most = math.min(most, math.floor(width(key.health))) end
  return most
end

-- When a call may start, by all of its keys, and which key says so; or why it may not.
local function judge(call)
  local start, decisive, verdict = now, 0, GO
  for _, item in ipairs(call.items) do
    local n, cost = item[1], item[2]
    local kind = ask.keys[n].kind
    local ready = now
    if kind == 'rate' then
      local limit = rate(n)
      if limit then
        ready = due(n)
        local queued = 0  -- until when those have their turns who are before this one
        if call.turn < 2 then queued = load(n).again or 0 end
        if call.turn < 1 then queued = math.max(queued, load(n).line or 0) end
        if queued > now + ask.patience and ready > now + ask.patience * IDLE then
          ready = queued
        end
      end
    elseif kind == 'window' then
      local limit = ask.keys[n].limit
      if ask.kept and not load(n).known then return UNKNOWN, 0, n end
      if used_in(n) + math.min(cost, limit) > limit then
        ready = math.max(now + ask.patience + 1, room_in(n, math.min(cost, limit)))
      end
    elseif kind == 'health' then
      ready = load(n).pause or 0
    elseif load(n).used >= cap(n) then
      return BUSY, 0, n
    end
    if ready > start then start, decisive = ready, n end
  end
  if start > now + ask.patience then verdict = LATER end
  return verdict, start, decisive
end

local function take(call)
  for _, item in ipairs(call.items) do
    local n, cost = item[1], item[2]
    local kind = ask.keys[n].kind
    if kind == 'rate' then
      local limit, unit = rate(n)
      if limit then
        load(n).at = due(n) + math.min(cost, limit) * unit
        touch(n)
      end
    elseif kind == 'window' then
      spend(n, math.min(cost, ask.keys[n].limit))
    elseif kind == 'permits' then
      redis.call('ZADD', KEYS[n + 1], whole(now + ask.lease), call.id)
      load(n).used = load(n).used + 1
    end
  end
end

-- Keys that stand and fall together: a deployment's. Any other is by itself, lest a queue at one
-- deployment hold up the tenant's calls to another.
local function group(n) return ask.keys[n].health or n end

local function paused(n)
  local health = ask.keys[n].health
  return health and load(health).pause or 0
end

-- A place in line: each of those that must come again is told another time, as far apart as the
-- limit allows, and a little early, so that it waits for its turn and not its turn for it. Who would
-- wait longer than can be known is no part of the line, and asks for a place again.
local function queue(call, start, decisive, number)
  local at = start
  local field = call.turn > 0 and 'again' or 'line'
  local longest = call.sure and ask.longest or ask.unsure
  for _, item in ipairs(call.items) do
    local n, kind = item[1], ask.keys[item[1]].kind
    local limit, unit = ask.keys[n].limit, 0
    if kind == 'rate' then limit, unit = rate(n) end
    if kind == 'window' then unit = ask.keys[n].period / limit end
    if limit and unit > 0 and group(n) == group(decisive) then
      local state = load(n)
      local ready = math.max(state[field] or 0, kind == 'rate' and due(n) or start, paused(n))
      at = math.max(at, ready)
      if ready - now <= longest and not call.probe then
        state[field] = ready + math.min(item[2], limit) * unit / HURRY[field]
        touch(n)
      end
    end
  end
  local wait = at - now - ask.patience * EARLY
  if at - now > longest then wait = longest * (0.4 + 0.6 * number / #ask.calls) end
  return math.max(ask.patience / 4, wait)
end

redis.call('ZADD', KEYS[1], whole(now), ask.worker)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', whole(now - SEEN_US))
redis.call('PEXPIRE', KEYS[1], 60000)
local workers = redis.call('ZRANGE', KEYS[1], 0, -1)
local place = 0
for _, name in ipairs(workers) do
  if name < ask.worker then place = place + 1 end
end

local reply = {#workers, place}
for number, call in ipairs(ask.calls) do
  local verdict, start, decisive = judge(call)
  local wait = 0
  if verdict == GO then
    take(call)
    wait = start - now
  elseif verdict == LATER then
    wait = queue(call, start, decisive, number)
  end
  reply[#reply + 1] = verdict
  reply[#reply + 1] = math.ceil(wait)
  reply[#reply + 1] = decisive
end

-- -- write down ----------------------------------------------------------------------------

local function keep(key, ...)
  redis.call('HSET', key, ...)
end

for n, state in pairs(states) do
  local key, what = KEYS[n + 1], ask.keys[n]
  local until_us = KEEP_US + what.period
  if state.changed and what.kind == 'rate' then
    if state.at then keep(key, 'at', whole(state.at)) end
    if state.line then keep(key, 'line', whole(state.line)) end
    if state.again then keep(key, 'again', whole(state.again)) end
    if state.told then keep(key, 'told', whole(state.told), 'till', whole(state.till or 0)) end
    until_us = until_us + math.max(0, state.at or 0, state.line or 0) - now
    if until_us < KEEP_US then until_us = KEEP_US end
  elseif state.changed and what.kind == 'window' then
    local newest = piece_of(n)
    for piece, used in pairs(state.pieces or {}) do
      if piece == newest or state.recalled then
        keep(key, whole(piece), string.format('%.17g', used))
      end
    end
    if ask.kept and state.known then
      keep(key, 'known', 1)
      redis.call('ZADD', KEYS[#KEYS], whole(now), what.tenant .. '\0' .. key)
    end
    if state.line then keep(key, 'line', whole(state.line)) end
    if state.again then keep(key, 'again', whole(state.again)) end
    if state.gone and #state.gone > 0 then redis.call('HDEL', key, unpack(state.gone)) end
    until_us = KEEP_US + 2 * what.period
  elseif state.changed then
    if state.pause then keep(key, 'pause', whole(state.pause)) end
    if state.factor then
      keep(key, 'factor', string.format('%.17g', state.factor), 'at', whole(state.at))
    end
    if state.width then keep(key, 'width', string.format('%.17g', state.width)) end
    if state.cut then keep(key, 'cut', whole(state.cut), 'steady', 1) end
    until_us = KEEP_US + math.max(0, (state.pause or 0) - now)
  end
  if state.changed then
    redis.call('PEXPIRE', key, whole(until_us / 1000))
  elseif what.kind == 'permits' then
    redis.call('PEXPIRE', key, whole(2 * ask.lease / 1000))
  end
end
return reply
