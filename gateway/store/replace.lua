#!lua
-- Keep another revision of a session in place of the one that was read; say so to every replica.
-- KEYS: session, deadlines, owner, events
-- ARGV: id, record, revision, expires_at, idle, deadline, gone_at, revision before, event, events kept
if redis.call('HGET', KEYS[1], 'revision') ~= ARGV[8] then return 0 end
redis.call('HSET', KEYS[1], 'record', ARGV[2], 'revision', ARGV[3], 'expires_at', ARGV[4], 'idle', ARGV[5])
redis.call('PEXPIREAT', KEYS[1], ARGV[7])
redis.call('ZADD', KEYS[2], 'XX', ARGV[6], ARGV[1])
redis.call('ZADD', KEYS[3], ARGV[4], ARGV[1])
redis.call('PEXPIREAT', KEYS[3], ARGV[7], 'GT')
redis.call('XADD', KEYS[4], 'MAXLEN', '~', ARGV[10], '0-*', 'event', ARGV[9])
return 1
