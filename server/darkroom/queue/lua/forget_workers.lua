-- Count no worker as alive until it is heard again, which takes one that does live a second. Nobody is there to renew a
-- lease, so those that ran out meanwhile are not given another.
--
-- Writes workers, worker:<id>, serving:<model>, served, looked_after. Returns nothing of interest.

for _, worker in ipairs(redis.call('ZRANGE', prefix .. 'workers', 0, -1)) do
  redis.call('DEL', prefix .. 'worker:' .. worker)
end
redis.call('DEL', prefix .. 'workers')
for _, model in ipairs(redis.call('ZRANGEBYSCORE', prefix .. 'served', now_ms, '+inf')) do
  redis.call('DEL', prefix .. 'serving:' .. model)
  note_served(model)
end
look_after()
return 1
