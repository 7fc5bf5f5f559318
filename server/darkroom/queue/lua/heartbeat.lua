-- Say that a worker lives and which models it serves. Carries everything, so it also heals a wiped server.
--
-- ARGV 1 worker   2 ms it stays alive   3 encoded worker info   4.. model, encoded card, model, encoded card ...
-- Writes workers, worker:<id>, serving:<model>, cards. Returns nothing of interest.

local worker, ttl_ms = ARGV[1], tonumber(ARGV[2])
write_at_memory_limit()
local function beat(key)
  redis.call('ZREMRANGEBYSCORE', key, '-inf', '(' .. now_ms)
  redis.call('ZADD', key, now_ms + ttl_ms, worker)
  redis.call('PEXPIRE', key, 10 * ttl_ms)
end
beat(prefix .. 'workers')
redis.call('SET', prefix .. 'worker:' .. worker, ARGV[3], 'PX', ttl_ms)
for i = 4, #ARGV, 2 do
  beat(prefix .. 'serving:' .. ARGV[i])
  redis.call('HSET', prefix .. 'cards', ARGV[i], ARGV[i + 1])
end
return 1
