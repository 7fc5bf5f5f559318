-- Read the state of the whole queue. Writes nothing.
--
-- ARGV 1.. head start in µs of rank 0, rank 1 ...
-- Returns {{{model, depth, waiting cost, live workers that serve it, mean cost per second of a worker or ''}, ...},
-- in flight, created ms of the oldest waiting job or '', now ms, counters as fields and values, live workers,
-- dead letters}.

local models, oldest_us = {}, nil
for _, model in ipairs(redis.call('SMEMBERS', prefix .. 'models')) do
  local depth = 0
  for rank = 0, SUSPECT_RANK do
    local key = ready_key(rank, model)
    depth = depth + redis.call('ZCARD', key)
    local head = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')
    if head[1] then
      -- Suspects had the head starts of different classes.
      local created_us = rank == SUSPECT_RANK and 1000 * (redis.call('HGET', job_key(head[1]), 'created_ms') or now_ms)
        or tonumber(head[2]) + tonumber(ARGV[rank + 1])
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
