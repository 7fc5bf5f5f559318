-- Say that a worker lives and which models it serves. Carries everything, so it also heals a wiped server.
--
-- ARGV 1 worker   2 ms it stays alive   3 encoded worker info
--      4.. model, encoded card, cost per second that the worker has measured or '', model ...
-- Writes workers, worker:<id>, serving:<model>, served, cards, rates; cards, rates and spans of models that were last
-- served longer than JOB_TTL_MS ago are dropped. Returns 1 while someone looks on at the batches, else 0.

local worker, ttl_ms = ARGV[1], tonumber(ARGV[2])
write_at_memory_limit()
local function beat(key)
  redis.call('ZREMRANGEBYSCORE', key, '-inf', '(' .. now_ms)
  redis.call('ZADD', key, now_ms + ttl_ms, worker)
  redis.call('PEXPIRE', key, 10 * ttl_ms)
end
beat(prefix .. 'workers')
redis.call('SET', prefix .. 'worker:' .. worker, ARGV[3], 'PX', ttl_ms)
for i = 4, #ARGV, 3 do
  local model, rate = ARGV[i], tonumber(ARGV[i + 2])
  beat(prefix .. 'serving:' .. model)
  note_served(model)
  redis.call('HSET', prefix .. 'cards', model, ARGV[i + 1])
  if rate then
    -- A running mean over the workers of about ten beats of each: they all beat equally often.
    local mean = tonumber(redis.call('HGET', prefix .. 'rates', model) or rate)
    local weight = 1 / (10 * redis.call('ZCARD', prefix .. 'serving:' .. model))
    redis.call('HSET', prefix .. 'rates', model, string.format('%.9g', mean + weight * (rate - mean)))
  end
end
redis.call('ZREMRANGEBYSCORE', prefix .. 'served', '-inf', '(' .. (now_ms - JOB_TTL_MS))
for _, model in ipairs(redis.call('HKEYS', prefix .. 'cards')) do
  if not redis.call('ZSCORE', prefix .. 'served', model) then
    redis.call('HDEL', prefix .. 'cards', model)
    redis.call('HDEL', prefix .. 'rates', model)
    redis.call('HDEL', prefix .. 'spans', model)
  end
end
return redis.call('EXISTS', prefix .. 'watched')
