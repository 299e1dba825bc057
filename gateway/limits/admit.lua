#!lua
-- Let a call take from every limit that it asks, or from none. Time is that of the store.
-- KEYS: the call's end, then for each demand its key, and behind that of a budget the one of its holds
-- ARGV: the call's id, then for each demand: kind, cost, three figures, and 1 where it only shadows
--   rate: µs for one unit, burst, -   places: maximum, lease (µs), -
--   budget: maximum, hold (µs), how long the account is kept (ms)
-- Answers with the demand that refuses, 0 for none, -1 for a call that has ended; and for each demand
-- looked at whether it had room, and how far ahead (µs), how many run, how much is taken.
local SLACK = 0.0001
if redis.call('EXISTS', KEYS[1]) == 1 then return {-1} end
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]

-- A clock that went back stands still here: nobody waits for it to catch up.
local function backlog(key)
  local kept = redis.call('HMGET', key, 'ahead', 'at')
  if not kept[1] then return 0 end
  return math.max(0, kept[1] - math.max(0, now - kept[2]))
end

-- Calls that were never settled, because their gateway died: what they held is free again.
local function free_expired(account, holds)
  local expired = redis.call('ZRANGE', holds, '-inf', now, 'BYSCORE', 'LIMIT', 0, 200)
  for _, hold in ipairs(expired) do
    redis.call('ZREM', holds, hold)
    redis.call('HINCRBY', account, 'held', 0 - string.match(hold, ':(%d+)$'))
  end
end

local answer, found, key = {0}, {}, 2
for argument = 2, #ARGV, 6 do
  local kind, cost = ARGV[argument], tonumber(ARGV[argument + 1])
  local first, second = tonumber(ARGV[argument + 2]), tonumber(ARGV[argument + 3])
  local demand = {
    kind = kind, cost = cost, first = first, second = second,
    key = KEYS[key], holds = KEYS[key + 1], kept = ARGV[argument + 4],
  }
  local figure
  if kind == 'rate' then
    figure = backlog(demand.key)
    demand.fits = figure + cost * first <= first * (second + SLACK)
    if demand.fits then figure = figure + cost * first end
    demand.ahead = figure
  elseif kind == 'places' then
    redis.call('ZREMRANGEBYSCORE', demand.key, '-inf', now)
    figure = redis.call('ZCARD', demand.key)
    demand.fits = figure < first
  else
    free_expired(demand.key, demand.holds)
    local account = redis.call('HMGET', demand.key, 'spent', 'held')
    figure = (account[1] or 0) + (account[2] or 0)
    demand.fits = figure + cost <= first
    key = key + 1
  end
  key = key + 1
  found[#found + 1] = demand
  answer[#answer + 1] = demand.fits and 1 or 0
  answer[#answer + 1] = math.ceil(figure)
  if not demand.fits and ARGV[argument + 5] ~= '1' then
    answer[1] = #found
    return answer
  end
end

for _, demand in ipairs(found) do
  if not demand.fits then -- in shadow: it would have refused, and counts as if it had
  elseif demand.kind == 'rate' then
    redis.call('HSET', demand.key, 'ahead', string.format('%.3f', demand.ahead), 'at', now)
    redis.call('PEXPIRE', demand.key, math.ceil(demand.ahead / 1000) + 1000)
  elseif demand.kind == 'places' then
    redis.call('ZADD', demand.key, now + demand.second, ARGV[1])
    redis.call('PEXPIRE', demand.key, math.ceil(demand.second / 1000) + 1000)
  else
    redis.call('ZADD', demand.holds, now + demand.second, ARGV[1] .. ':' .. demand.cost)
    redis.call('HINCRBY', demand.key, 'held', demand.cost)
    redis.call('PEXPIRE', demand.key, demand.kept)
    redis.call('PEXPIRE', demand.holds, demand.kept)
  end
end
return answer
