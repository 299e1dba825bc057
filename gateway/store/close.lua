#!lua flags=allow-oom
-- Forget a session, and tell the one who asked first whose it was; say so to every replica.
-- An answer may get lost: who asks again with the same claim, within a while, is told again.
-- KEYS: session, deadlines, events, ended
-- ARGV: id, due_at (ms, or nothing: whenever it ends), event, events kept, claim, how long (ms)
local deadline = redis.call('ZSCORE', KEYS[2], ARGV[1])
if ARGV[2] ~= '' and deadline and tonumber(deadline) > tonumber(ARGV[2]) then return false end
redis.call('ZREM', KEYS[2], ARGV[1])
local kept = redis.call('HMGET', KEYS[1], 'about', 'owner')
if not kept[1] then
  local ended = redis.call('HMGET', KEYS[4], 'claim', 'about')
  return ended[1] == ARGV[5] and ended[2]
end
redis.call('DEL', KEYS[1])
redis.call('ZREM', kept[2], ARGV[1])
redis.call('HSET', KEYS[4], 'claim', ARGV[5], 'about', kept[1])
redis.call('PEXPIRE', KEYS[4], ARGV[6])
redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[4], '0-*', 'event', ARGV[3])
return kept[1]
