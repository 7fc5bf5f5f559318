-- Read the cards of the models that workers serve, or have served within JOB_TTL_MS. Writes nothing.
--
-- Returns {model, encoded card, ms since it was last served, model, ...}; the number is negative while a worker lives.

local reply = {}
local cards = redis.call('HGETALL', prefix .. 'cards')
for i = 1, #cards, 2 do
  local until_ms = redis.call('ZSCORE', prefix .. 'served', cards[i])
  if until_ms and now_ms - until_ms <= JOB_TTL_MS then
    reply[#reply + 1] = cards[i]
    reply[#reply + 1] = cards[i + 1]
    reply[#reply + 1] = now_ms - until_ms
  end
end
return reply
