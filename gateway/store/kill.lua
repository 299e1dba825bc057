#!lua flags=allow-oom
-- Place a kill or lift one, and say so to every replica in the same step; return whether that changed
-- what is known of it. That it was lifted stays known: absence proves nothing.
-- KEYS: kills, events; ARGV: id, what is known of it now, event, events kept
local before = redis.call('HGET', KEYS[1], ARGV[1])
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[4], '0-*', 'event', ARGV[3])
return before and before ~= ARGV[2] and 1 or 0
