-- Say that a worker is leaving. Its cards stay: a model that was offered once is known, not unknown.
--
-- ARGV 1 worker   2.. models
-- Writes workers, worker:<id>, serving:<model>. Returns nothing of interest.

redis.call('ZREM', prefix .. 'workers', ARGV[1])
redis.call('DEL', prefix .. 'worker:' .. ARGV[1])
for i = 2, #ARGV do redis.call('ZREM', prefix .. 'serving:' .. ARGV[i], ARGV[1]) end
return 1
