-- Admit a job: record, idempotency key, ready entry, reservation and counters in one step.
--
-- ARGV 1 job id             2 encoded job          3 model           4 rank            5 model rows
--      6 bytes to reserve   7 deadline in ms after now, '' for none  8 idempotency digest, '' for none
--      9 body hash         10 most jobs waiting   11 memory in use less the bytes stored when it was sampled
--     12 memory limit in bytes, 0 for none        13 head start of the class in µs   14 cost
--     15 the caller's connection                  16 longest wait promised, in ms    17 ms a promise outlives its time
--     18 tenant            19 its weight          20 most jobs of it waiting, '' for as many as the queue holds
--     21 '1' to cancel the job when those that wait for it have left
--     22 whose budget pays, '' for nobody's       23 most cost of its unfinished jobs, '' for no limit
--     24.. names of pictures that the same transaction has written to staged:<id>:0:<name>
-- Writes job:<id>, idempotency:<digest>, ready:<rank>:<model>, ready_of:<length>:<tenant>:<rank>:<model>, queued, backlog,
-- shares:<model>, tenants:<model>, abandoned, counters, models, events:<id>, notify:<model>, promises, promise:<caller>,
-- budget, input:<id>:<name>; removes staged:<id>:0:<name> of a job that is new.
-- Returns {'new' | 'known', id, state, position, ms until done or ''}, {'mismatch'}, {'queue_full', waiting, ms to wait or
-- ''}, {'tenant_queue_full', its jobs waiting, ms to wait or ''}, {'budget_exceeded', cost held, ms in which one worker
-- makes what is too much or ''}, {'storage_full'} or {'deadline_unmet', ms until done, ms that it takes by itself}. Sent
-- twice with one job id, the second call finds the first one's job and answers 'new' again.

local id, model = ARGV[1], ARGV[3]
local digest = ARGV[8]

-- Something is written then too: replicas may be waited for, and a call that wrote nothing waits for none.
local function known(outcome, known_id, state)
  write_at_memory_limit()
  redis.call('HSET', job_key(known_id), 'state', state)
  return { outcome, known_id, state, prospects(load_job(known_id)) }
end

local sent_before = redis.call('HGET', job_key(id), 'state')
if sent_before then return known('new', id, sent_before) end

if digest ~= '' then
  local earlier = redis.call('HMGET', prefix .. 'idempotency:' .. digest, 'job', 'body')
  if earlier[1] then
    local state = redis.call('HGET', job_key(earlier[1]), 'state')
    if state then
      if earlier[2] ~= ARGV[9] then return { 'mismatch' } end
      local reply = known('known', earlier[1], state)
      -- Its client is back: to wait again, or for good. A job that stays for good is left alone.
      if ARGV[21] ~= '1' then
        redis.call('ZREM', abandoned, earlier[1])
      elseif not TERMINAL[state] then
        redis.call('ZADD', abandoned, 'XX', 'GT', now_ms + GRACE_MS, earlier[1])
      end
      return reply
    end
  end
end

local payer, cost = ARGV[22], tonumber(ARGV[14])
if ARGV[23] ~= '' then
  local held = tonumber(redis.call('HGET', prefix .. 'budget', payer) or '0')
  local excess = held + cost - tonumber(ARGV[23])
  if excess > 0 then
    local rate = tonumber(redis.call('HGET', prefix .. 'rates', model) or '0')
    return { 'budget_exceeded', held, rate > 0 and math.ceil(1000 * excess / rate) or '' }
  end
end

-- A tenant may not fill the queue, so that others always find room.
local tenant, weight = ARGV[18], tonumber(ARGV[19])
if ARGV[20] ~= '' then
  local held = 0
  for _, other in ipairs(redis.call('SMEMBERS', prefix .. 'models')) do held = held + waiting_of(tenant, other) end
  if held >= tonumber(ARGV[20]) then
    -- Until the next job of its own is claimed, if claims go on as they did and each tenant has its share of them.
    local gap_ms = tonumber(redis.call('HGET', prefix .. 'pace', 'gap_ms') or '')
    local all = 0
    for _, other in ipairs(redis.call('ZRANGE', shares_key(model), 0, -1)) do
      all = all + (other == tenant and weight or tonumber(redis.call('HGET', tenants_key(model), 'weight:' .. other) or 1))
    end
    return { 'tenant_queue_full', held, gap_ms and math.ceil(gap_ms * math.max(1, all / weight)) or '' }
  end
end

-- A caller that is refused is promised a place at a time, and what is promised is kept from others meanwhile. It is known
-- again by what it asks for, and by its connection if it kept that.
local caller, connection = digest ~= '' and digest or ARGV[9], ARGV[15]
local longest_ms, grace_ms = tonumber(ARGV[16]), tonumber(ARGV[17])
local promises, own = prefix .. 'promises', prefix .. 'promise:' .. caller
local oldest_ms = now_ms - grace_ms
local due_ms = tonumber(redis.call('ZSCORE', own, connection) or '')
if not due_ms or due_ms < oldest_ms then
  local first = redis.call('ZRANGEBYSCORE', own, oldest_ms, now_ms, 'WITHSCORES', 'LIMIT', 0, 1)
  due_ms = nil
  if first[1] then connection, due_ms = first[1], tonumber(first[2]) end
end

local waiting, most = redis.call('ZCARD', queued), tonumber(ARGV[10])
-- Promises keep newcomers out of the upper half alone: callers that never come back must not leave the queue empty.
local of_others = redis.call('ZCOUNT', promises, oldest_ms, '+inf') - (due_ms and 1 or 0)
local places = math.max(math.ceil(most / 2), most - of_others)
-- One whose time has come gets in a little above the limit too: it was promised.
if due_ms and due_ms <= now_ms then places = most + math.ceil(most / 4) end
if waiting >= places then
  if due_ms and due_ms > now_ms then return { 'queue_full', waiting, due_ms - now_ms } end
  local gap_ms = tonumber(redis.call('HGET', prefix .. 'pace', 'gap_ms') or '')
  if not gap_ms then return { 'queue_full', waiting, '' } end
  local last = not due_ms and redis.call('ZRANGE', promises, -1, -1, 'WITHSCORES') or {}
  -- A little sooner than the pace says: one who is early is let in above the limit, one who is late leaves a place empty.
  local wait_ms = math.max(0, (last[2] or 0) - now_ms) + 0.95 * gap_ms * (1 + math.max(0, waiting - most))
  if wait_ms > longest_ms then return { 'queue_full', waiting, longest_ms } end
  redis.call('ZREMRANGEBYSCORE', promises, '-inf', '(' .. oldest_ms)
  redis.call('ZREMRANGEBYSCORE', own, '-inf', '(' .. oldest_ms)
  redis.call('ZADD', own, now_ms + wait_ms, connection)
  redis.call('PEXPIRE', own, longest_ms + grace_ms)
  redis.call('ZADD', promises, now_ms + wait_ms, caller .. ':' .. connection)
  redis.call('PEXPIRE', promises, longest_ms + grace_ms)
  return { 'queue_full', waiting, math.ceil(wait_ms) }
end

local limit = tonumber(ARGV[12])
if limit > 0 then
  local held = redis.call('HMGET', counters, 'stored_bytes', 'reserved_bytes')
  if ARGV[11] + (held[1] or 0) + (held[2] or 0) + ARGV[6] > limit then return { 'storage_full' } end
end

local job = {
  state = 'queued', model = model, rank = tonumber(ARGV[4]), score = now_us - tonumber(ARGV[13]),
  failures = 0, cost = cost, deadline_ms = ARGV[7] ~= '' and now_ms + tonumber(ARGV[7]) or nil,
  rows = tonumber(ARGV[5]), tenant = tenant, weight = weight,
}
local ahead, eta_ms, least_ms, is_idle = estimate(job, false)
-- Where nothing stands in its way it is tried, unless all that was measured says no: else a measurement that has become
-- wrong would refuse all that could correct it.
if job.deadline_ms and eta_ms ~= '' and now_ms + (is_idle and least_ms or eta_ms) > job.deadline_ms then
  return { 'deadline_unmet', eta_ms, math.ceil(least_ms) }
end
-- First all of them: where one is missing nothing may stay for good.
for i = 24, #ARGV do redis.call('RENAME', prefix .. 'staged:' .. id .. ':0:' .. ARGV[i], input_key(id, ARGV[i])) end
for i = 24, #ARGV do redis.call('PERSIST', input_key(id, ARGV[i])) end
redis.call('HSET', job_key(id), 'state', 'queued', 'payload', ARGV[2], 'model', model, 'rank', ARGV[4],
  'rows', ARGV[5], 'reserved', ARGV[6], 'score', job.score, 'created_ms', now_ms, 'deadline_ms', job.deadline_ms or '',
  'attempt', 0, 'failures', 0, 'idempotency', digest, 'cost', ARGV[14])
if tenant ~= 'default' then redis.call('HSET', job_key(id), 'tenant', tenant, 'weight', ARGV[19]) end
if payer ~= '' then
  redis.call('HSET', job_key(id), 'payer', payer)
  redis.call('HINCRBY', prefix .. 'budget', payer, ARGV[14])
end
if due_ms then
  redis.call('ZREM', own, connection)
  redis.call('ZREM', promises, caller .. ':' .. connection)
end
if digest ~= '' then
  redis.call('DEL', prefix .. 'idempotency:' .. digest)
  redis.call('HSET', prefix .. 'idempotency:' .. digest, 'job', id, 'body', ARGV[9])
end
if ARGV[21] == '1' then redis.call('ZADD', abandoned, now_ms + GRACE_MS, id) end
redis.call('HINCRBY', counters, 'accepted', 1)
redis.call('HINCRBY', counters, 'reserved_bytes', ARGV[6])
redis.call('SADD', prefix .. 'models', model)
add_event(id, 'queued', 0, 0, JOB_TTL_MS)
make_ready(id, job)
return { 'new', id, 'queued', ahead, eta_ms }
