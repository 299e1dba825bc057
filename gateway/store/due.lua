#!lua flags=no-writes
-- Name sessions whose deadline has come, each with its expiry (ms; nothing where the record is gone).
-- KEYS: deadlines; ARGV: now (ms), how many, prefix of a session's key (of the same hash slot)
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ARGV[1], 'LIMIT', 0, ARGV[2])
local found = {}
for number, id in ipairs(due) do
  found[2 * number - 1] = id
  found[2 * number] = redis.call('HGET', ARGV[3] .. id, 'expires_at')
end
return found
