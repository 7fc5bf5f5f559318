-- Say that a worker is leaving. Its cards stay for a while: it may be about to come back.
--
-- ARGV 1 worker   2.. models
-- Writes workers, worker:<id>, serving:<model>, served. Returns nothing of interest.

redis.call('ZREM', prefix .. 'workers', ARGV[1])
redis.call('DEL', prefix .. 'worker:' .. ARGV[1])
for i = 2, #ARGV do
  redis.call('ZREM', prefix .. 'serving:' .. ARGV[i], ARGV[1])
  note_served(ARGV[i])
end
return 1
