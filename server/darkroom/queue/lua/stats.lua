-- Read the state of the whole queue. Writes nothing.
--
-- ARGV 1.. head start in µs of rank 0, rank 1 ...
-- Returns {{{model, depth, waiting cost, live workers that serve it, mean cost per second of a worker or ''}, ...},
-- in flight, created ms of the oldest waiting job or '', now ms, counters as fields and values, live workers,
-- dead letters, tenants with waiting jobs, jobs of the one that has most}.

local models, held, oldest_us = {}, {}, nil
for _, model in ipairs(redis.call('SMEMBERS', prefix .. 'models')) do
  local function look(key, head_start_us)
    local head = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')
    if not head[1] then return 0 end
    -- Suspects had the head starts of different classes.
    local created_us = head_start_us and tonumber(head[2]) + head_start_us
      or 1000 * (redis.call('HGET', job_key(head[1]), 'created_ms') or now_ms)
    oldest_us = math.min(oldest_us or created_us, created_us)
    return redis.call('ZCARD', key)
  end
  local depth = look(ready_key(SUSPECT_RANK, model))
  for _, tenant in ipairs(tenants_of(model)) do
    local waiting = 0
    for rank = 0, NUM_RANKS - 1 do waiting = waiting + look(ready_key(rank, model, tenant), tonumber(ARGV[rank + 1])) end
    if waiting > 0 then held[tenant] = (held[tenant] or 0) + waiting end
    depth = depth + waiting
  end
  models[#models + 1] = {
    model, depth, tonumber(redis.call('HGET', backlog, model) or '0'),
    redis.call('ZCOUNT', prefix .. 'serving:' .. model, now_ms, '+inf'), redis.call('HGET', prefix .. 'rates', model) or '',
  }
end
local num_tenants, most = 0, 0
for _, waiting in pairs(held) do
  num_tenants, most = num_tenants + 1, math.max(most, waiting)
end
return {
  models, redis.call('ZCARD', leases), oldest_us and math.floor(oldest_us / 1000) or '', now_ms,
  redis.call('HGETALL', counters), redis.call('ZCOUNT', prefix .. 'workers', now_ms, '+inf'),
  redis.call('XLEN', prefix .. 'dead'), num_tenants, most,
}
