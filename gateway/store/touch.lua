#!lua flags=allow-oom
-- Move the deadlines of sessions that were used: only ever later, and never past their expiry.
-- KEYS: deadlines, then one session for each id
-- ARGV: for each id: id, used_at (ms)
for number = 2, #KEYS do
  local id, used_at = ARGV[2 * number - 3], tonumber(ARGV[2 * number - 2])
  local kept = redis.call('HMGET', KEYS[number], 'expires_at', 'idle')
  if kept[1] then
    local deadline = math.min(tonumber(kept[1]), used_at + tonumber(kept[2]))
    redis.call('ZADD', KEYS[1], 'XX', 'GT', string.format('%.0f', deadline), id)
  end
end
