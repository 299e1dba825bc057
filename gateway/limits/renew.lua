#!lua flags=allow-oom
-- Keep for a call that still runs what it holds; what had expired it holds again.
-- KEYS: the call's end, then for each demand its key, and behind that of a budget the one of its holds
-- ARGV: the call's id, then for each demand: kind, what was taken, for how long (µs)
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local key = 2
for argument = 2, #ARGV, 3 do
  local kind, taken, lease = ARGV[argument], ARGV[argument + 1], ARGV[argument + 2]
  if kind == 'places' then
    redis.call('ZADD', KEYS[key], now + lease, ARGV[1])
    redis.call('PEXPIRE', KEYS[key], math.ceil(lease / 1000) + 1000)
  else
    if redis.call('ZADD', KEYS[key + 1], now + lease, ARGV[1] .. ':' .. taken) == 1 then
      redis.call('HINCRBY', KEYS[key], 'held', taken)
    end
    key = key + 1
  end
  key = key + 1
end
return 1
