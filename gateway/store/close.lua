-- Forget a session and hand it to the one who asked first; say so to every replica.
-- KEYS: session, deadlines, events
-- ARGV: id, due_at (ms, or nothing: whenever it ends), event, events kept
local deadline = redis.call('ZSCORE', KEYS[2], ARGV[1])
if ARGV[2] ~= '' and deadline and tonumber(deadline) > tonumber(ARGV[2]) then return false end
redis.call('ZREM', KEYS[2], ARGV[1])
local kept = redis.call('HMGET', KEYS[1], 'record', 'owner')
if not kept[1] then return false end
redis.call('DEL', KEYS[1])
redis.call('ZREM', kept[2], ARGV[1])
redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[4], '0-*', 'event', ARGV[3])
return kept[1]
