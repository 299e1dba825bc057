#!lua flags=allow-oom
-- Say who shares this store, or hear who does; the epoch changes when the store has lost its memory.
-- KEYS: about, events; ARGV: check, epoch
redis.call('HSETNX', KEYS[1], 'check', ARGV[1])
redis.call('HSETNX', KEYS[1], 'epoch', ARGV[2])
local about = redis.call('HMGET', KEYS[1], 'check', 'epoch')
local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
return {about[1], about[2], last[1] and last[1][1] or '0-0'}
