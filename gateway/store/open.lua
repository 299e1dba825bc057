#!lua
-- Keep a new session, if there is room for it.
-- KEYS: session, deadlines, owner
-- ARGV: id, record, revision, expires_at, idle, deadline, gone_at, about, now, total, per_subject
-- (instants in ms)
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', ARGV[9])
if redis.call('ZCARD', KEYS[2]) >= tonumber(ARGV[10]) then return 'too many in all' end
if redis.call('ZCARD', KEYS[3]) >= tonumber(ARGV[11]) then return 'too many of owner' end
redis.call('HSET', KEYS[1], 'record', ARGV[2], 'revision', ARGV[3], 'expires_at', ARGV[4],
  'idle', ARGV[5], 'owner', KEYS[3], 'about', ARGV[8])
redis.call('PEXPIREAT', KEYS[1], ARGV[7])
redis.call('ZADD', KEYS[2], ARGV[6], ARGV[1])
redis.call('ZADD', KEYS[3], ARGV[4], ARGV[1])
redis.call('PEXPIREAT', KEYS[3], ARGV[7], 'NX')
redis.call('PEXPIREAT', KEYS[3], ARGV[7], 'GT')
return 'open'
