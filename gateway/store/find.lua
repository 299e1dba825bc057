#!lua flags=no-writes
-- Read sessions, each with its deadline (ms).
-- KEYS: deadlines, then one session for each id; ARGV: ids
local found = {}
for number = 1, #ARGV do
  found[2 * number - 1] = redis.call('HGET', KEYS[number + 1], 'record')
  found[2 * number] = redis.call('ZSCORE', KEYS[1], ARGV[number])
end
return found
