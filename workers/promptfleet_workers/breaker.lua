-- The fleet's breaker of one deployment: count what a worker saw, judge, and say how things stand.
-- Only the server's clock counts. Times that leave or enter are durations in milliseconds.
-- KEYS[1]: promptfleet:breaker:{deployment}, the fleet's view as JSON; expires when nobody asks.
-- ARGV[1]: Terms, ARGV[2]: Report, both as in breaker_reports.py and as JSON.
-- Returns FleetView as JSON.
local terms, report = cjson.decode(ARGV[1]), cjson.decode(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local PIECES = 10            -- of the window
local SAVED_S = 10           -- a quiet fleet saves the retries of so many seconds
local HOLD_MS = 2000         -- a probe's token until its call starts
local LEASE_MS = 3000        -- a probe's token while its worker says that the call runs
local PAUSE_MS = 1000        -- after a probe that said nothing
local MAX_OPENS = 30         -- enough doublings

local stored = redis.call('GET', KEYS[1])
local view = stored and cjson.decode(stored) or {
  epoch = 0, state = 'closed', opens = 0, open_until = 0, stopped = false, ramp_from = 0,
  probe = '', probe_until = 0, tokens = terms.retries_per_s, filled_at = now, pieces = {},
}

-- Each change that matters starts an epoch; what was counted in an older one no longer counts.
local function enter(state)
  view.state = state
  view.epoch = math.max(now, view.epoch + 1)
  view.pieces = {}
  view.probe, view.probe_until = '', 0
end

local function open()
  view.opens = math.min(view.opens + 1, MAX_OPENS)
  local cool_down = terms.cool_down_ms * 2 ^ (view.opens - 1)
  view.open_until = now + math.min(terms.max_cool_down_ms, cool_down)
  view.stopped = false
  enter('open')
end

-- The server lost its data, or is an older copy: the worker knows better. Somebody may be probing,
-- who will say so within a moment.
local function restore()
  view.epoch, view.state, view.opens = report.epoch, report.state, report.opens
  view.stopped = report.stopped
  view.open_until, view.ramp_from = now + report.until_ms, now - report.ramp_ms
  view.pieces = {}
  view.probe, view.probe_until = '', now + PAUSE_MS
end

-- Add what the worker counted; returns the window's calls, failures and first calls.
local function count()
  local piece = math.floor(now * PIECES / terms.window_ms)
  local kept, calls, failed, firsts = {}, 0, 0, 0
  for _, old in ipairs(view.pieces) do
    if old[1] > piece - PIECES and old[1] <= piece then kept[#kept + 1] = old end
  end
  if report.ok + report.failed + report.firsts > 0 then
    local last = kept[#kept]
    if not last or last[1] ~= piece then
      last = {piece, 0, 0, 0}
      kept[#kept + 1] = last
    end
    if report.epoch == view.epoch then
      last[2], last[3] = last[2] + report.ok, last[3] + report.failed
    end
    last[4] = last[4] + report.firsts
  end
  for _, each in ipairs(kept) do
    calls, failed, firsts = calls + each[2] + each[3], failed + each[3], firsts + each[4]
  end
  view.pieces = kept
  return calls, failed, firsts
end

-- What became of the worker's probe, if nobody else has the token by now.
local function judge_probe()
  local theirs = view.probe ~= '' and view.probe ~= report.worker and view.probe_until > now
  if view.state ~= 'open' or report.epoch ~= view.epoch or theirs then return end
  if report.probe == 'ok' then
    view.ramp_from, view.stopped = now, false
    enter('ramp')
  elseif report.probe == 'failed' then
    open()
  elseif report.probe == 'none' then
    view.probe, view.probe_until = '', 0
    view.open_until = math.max(view.open_until, now + PAUSE_MS)
  elseif report.probe == 'running' then
    view.probe, view.probe_until = report.worker, now + LEASE_MS
  elseif report.probe == 'ask' and now >= view.open_until
      and (view.probe == report.worker or view.probe_until <= now) then
    view.probe, view.probe_until = report.worker, now + HOLD_MS
  end
end

-- The worker gives back what it did not spend (or what it owes), and takes what it wants next.
local function share_retries(firsts)
  local seconds = math.max(0, now - view.filled_at) / 1000
  view.filled_at = now
  local earned = seconds * terms.retries_per_s + report.firsts * terms.retry_share
  local room = math.max(1, SAVED_S * terms.retries_per_s) + firsts * terms.retry_share
  local tokens = math.min(room, view.tokens + report.tokens + earned)
  local offer = math.floor(math.max(tokens / 2, math.min(tokens, 1)))  -- others want some, too
  local granted = math.max(0, math.min(report.want, offer))
  view.tokens = tokens - granted
  return granted
end

if report.epoch > view.epoch then restore() end
if view.state == 'ramp' and now - view.ramp_from >= terms.ramp_ms then
  view.state, view.opens = 'closed', 0
end
local calls, failed, firsts = count()
if view.state ~= 'open' then
  local proven = calls >= terms.min_calls
  if proven and failed >= calls * terms.failure_share then
    open()
  elseif report.tripped and not proven and view.state == 'closed' then
    view.opens = report.opens - 1 -- the fleet saw too little to contradict this worker
    open()
  end
end
judge_probe()
if report.stop_ms > 0 then
  if view.state ~= 'open' then enter('open') end
  view.open_until, view.stopped = math.max(view.open_until, now + report.stop_ms), true
end
local granted = share_retries(firsts)
local until_ms = math.max(0, view.open_until - now)

local news = report.ok + report.failed + report.firsts + report.want > 0 or report.tokens ~= 0
if news or view.state ~= 'closed' or view.epoch > 0 then
  local keep_ms = terms.window_ms + terms.ramp_ms + 2 * terms.max_cool_down_ms + until_ms
  redis.call('SET', KEYS[1], cjson.encode(view), 'PX', string.format('%.0f', keep_ms))
end

return cjson.encode({
  state = view.state,
  epoch = view.epoch,
  opens = view.opens,
  until_ms = until_ms,
  stopped = view.stopped,
  ramp_ms = math.max(0, now - view.ramp_from),
  probe = view.state == 'open' and view.probe == report.worker and view.probe_until > now,
  well = calls >= terms.min_calls and failed <= calls * terms.retry_share,
  tokens = granted,
  spare = view.tokens >= 1,
  calls = calls,
  failed = failed,
})
