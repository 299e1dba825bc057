#!lua flags=allow-oom
-- Put what a call really took in place of what it had reserved, once.
-- KEYS: the call's end, then for each demand its key, and behind that of a budget the one of its holds
-- ARGV: the call's id, how long its end is remembered (ms), then for each demand: kind, what was taken,
--   what counts, µs for one unit of a rate, how long an account is kept (ms)
-- Answers with 1, or 0 where the call had been settled; and for each budget what was spent before and
-- after.
if not redis.call('SET', KEYS[1], 1, 'NX', 'PX', ARGV[2]) then return {0} end
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local answer, key = {1}, 2
for argument = 3, #ARGV, 5 do
  local kind, taken, counts = ARGV[argument], ARGV[argument + 1], ARGV[argument + 2]
  if kind == 'rate' then
    local kept = redis.call('HMGET', KEYS[key], 'ahead', 'at')
    local ahead = kept[1] and math.max(0, kept[1] - math.max(0, now - kept[2])) or 0
    ahead = math.max(0, ahead + (counts - taken) * ARGV[argument + 3])
    redis.call('HSET', KEYS[key], 'ahead', string.format('%.3f', ahead), 'at', now)
    redis.call('PEXPIRE', KEYS[key], math.ceil(ahead / 1000) + 1000)
  elseif kind == 'places' then
    redis.call('ZREM', KEYS[key], ARGV[1])
  else
    if redis.call('ZREM', KEYS[key + 1], ARGV[1] .. ':' .. taken) == 1 then
      redis.call('HINCRBY', KEYS[key], 'held', 0 - taken)
    end
    local after = redis.call('HINCRBY', KEYS[key], 'spent', counts)
    redis.call('PEXPIRE', KEYS[key], ARGV[argument + 4])
    answer[#answer + 1] = after - counts
    answer[#answer + 1] = after
    key = key + 1
  end
  key = key + 1
end
return answer
