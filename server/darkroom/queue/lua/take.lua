-- Count one call against a key's rate: the generic cell rate algorithm, in Redis server time.
--
-- ARGV 1 key id   2 µs between two calls in the long run   3 calls that may come at once
-- The one number kept is the µs at which the key would have its whole burst again.
-- Writes rate:<key>. Returns {1 allowed or 0, calls left, µs until the next is allowed, µs until all of the burst is}.

local key = prefix .. 'rate:' .. ARGV[1]
local interval, burst = tonumber(ARGV[2]), tonumber(ARGV[3])
local whole_us = math.max(now_us, tonumber(redis.call('GET', key) or '0'))
local left = math.floor(burst - (whole_us - now_us) / interval)
if left < 1 then return { 0, 0, whole_us - now_us - (burst - 1) * interval, whole_us - now_us } end
whole_us = whole_us + interval
redis.call('SET', key, string.format('%.0f', whole_us), 'PX', math.ceil((whole_us - now_us) / 1000))
return { 1, left - 1, 0, whole_us - now_us }
