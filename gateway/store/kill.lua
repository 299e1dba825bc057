#!lua flags=allow-oom
-- Place a kill or lift one, and say so to every replica in the same step.
-- KEYS: kills, events; ARGV: id, what stands (or nothing: it is lifted), event, events kept
local stood = 1
if ARGV[2] ~= '' then
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
else
  stood = redis.call('HDEL', KEYS[1], ARGV[1])
end
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[4], '0-*', 'event', ARGV[3])
return stood
