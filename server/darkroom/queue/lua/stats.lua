-- Read the state of the whole queue. Writes nothing.
--
-- ARGV 1.. head start in µs of rank 0, rank 1 ...
-- Returns {{{model, depth, waiting cost, live workers that serve it, mean cost per second of a worker or ''}, ...},
-- in flight, created ms of the oldest waiting job or '', now ms, counters as fields and values, live workers,
-- dead letters}.

local models, oldest_us = {}, nil
for _, model in ipairs(redis.call('SMEMBERS', prefix .. 'models')) do
  local depth = 0
  for rank = 0, NUM_RANKS - 1 do
    local key = ready_key(rank, model)
    depth = depth + redis.call('ZCARD', key)
    local head = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')
    if head[1] then
      local created_us = tonumber(head[2]) + tonumber(ARGV[rank + 1])
      oldest_us = math.min(oldest_us or created_us, created_us)
    end
  end
  models[#models + 1] = {
    model, depth, tonumber(redis.call('HGET', backlog, model) or '0'),
    redis.call('ZCOUNT', prefix .. 'serving:' .. model, now_ms, '+inf'), redis.call('HGET', prefix .. 'rates', model) or '',
  }
end
return {
  models, redis.call('ZCARD', leases), oldest_us and math.floor(oldest_us / 1000) or '', now_ms,
  redis.call('HGETALL', counters), redis.call('ZCOUNT', prefix .. 'workers', now_ms, '+inf'),
  redis.call('XLEN', prefix .. 'dead'),
}
