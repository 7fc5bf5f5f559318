-- Lease ready jobs to a worker: of the tenant whose turn it is, oldest score first.
--
-- ARGV 1 worker   2 claim token   3 most jobs   4 most model rows   5 least rank
--      6 what the worker holds: nothing, jobs or a suspect   7 number of models   8.. models, then the tenants whose jobs
--      a full worker holds, none for one that has room
-- A full worker is given jobs of the least rank or above. To a tenant of whose jobs it holds none it gives a place too,
-- whatever their rank, so that nobody waits for a whole job of another. A tenant whose turn it is not gets neither.
-- The first job is given whatever its rows; after it the claim stops at the first one that does not fit, so a large job
-- is never overtaken for ever. Of each model no more is taken than the backlog divided by the live workers, rounded up.
-- A suspect (SUSPECT_FAILURES workers were lost with it) is given alone, to a worker that holds nothing. One that holds jobs gets no
-- more of them until it holds none, then the suspect; at most one worker at a time makes itself free like that.
-- A claim repeated with the token of the last one returns that one's jobs: a lost reply strands nothing.
-- Writes ready:<rank>:<model>, ready_of:<length>:<tenant>:<rank>:<model>, queued, backlog, shares:<model>, debts:<model>,
-- tenants:<model>, running, leases, job:<id>, events:<id>, claim:<worker>, pace, reserved, notify:<model>;
-- jobs that are past their deadline or unreadable are finished on the way.
-- Returns a list of {id, encoded job, attempt, failures, created ms, deadline ms or '', now ms, 1 + the highest index of
-- an image with a checkpoint, what those who watch it want to see}, or {'free_first'} to a worker that gets nothing until it holds nothing.

local worker, token = ARGV[1], ARGV[2]
local max_jobs, max_rows, min_rank = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local holds = ARGV[6]
local claim_key, reserved = prefix .. 'claim:' .. worker, prefix .. 'reserved'
write_at_memory_limit()

local function describe(id)
  local fields = redis.call('HMGET', job_key(id), 'payload', 'attempt', 'failures', 'created_ms', 'deadline_ms',
    'checkpoints')
  return { id, fields[1] or '', tonumber(fields[2]), tonumber(fields[3]), tonumber(fields[4] or '0') or 0,
    fields[5] or '', now_ms, tonumber(fields[6] or '0') or 0, looked_at(id) }
end

local reply = {}
local last = redis.call('LRANGE', claim_key, 0, -1)
if last[1] == token then
  for i = 2, #last, 2 do
    if is_owned(load_job(last[i]), worker, tonumber(last[i + 1])) then reply[#reply + 1] = describe(last[i]) end
  end
  return reply
end

if holds == 'suspect' then return { 'free_first' } end

local waiting, share, held_tenants, num_models = {}, {}, {}, tonumber(ARGV[7])
for i = 8, 7 + num_models do
  local model = ARGV[i]
  local workers = redis.call('ZCOUNT', prefix .. 'serving:' .. model, now_ms, '+inf')
  waiting[model] = waiting_for(model)
  share[model] = math.ceil((waiting[model] - redis.call('ZCARD', ready_key(SUSPECT_RANK, model))) / math.max(1, workers))
end
for i = 8 + num_models, #ARGV do held_tenants[ARGV[i]] = true end
local is_full = next(held_tenants) ~= nil

local function next_suspect()
  local first
  for model in pairs(share) do
    local key = ready_key(SUSPECT_RANK, model)
    local head = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')
    if head[1] and (not first or tonumber(head[2]) < first.score) then
      first = { id = head[1], score = tonumber(head[2]), key = key, model = model }
    end
  end
  return first
end

local function first_tenant_of(model)
  if not redis.call('ZSCORE', shares_key(model), 'default') then return 'default' end
  return redis.call('ZRANGE', shares_key(model), 0, 0)[1]
end

local function next_ready()
  local first
  for model, left in pairs(share) do
    -- Not all tenants by name: there may be hundreds, and it is nearly always the first one's turn.
    local tenant = left > 0 and first_tenant_of(model)
    while tenant do
      local has_jobs, least = false, is_full and not held_tenants[tenant] and 0 or min_rank
      for rank = 0, NUM_RANKS - 1 do
        local key = ready_key(rank, model, tenant)
        local head = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')
        has_jobs = has_jobs or head[1] ~= nil
        if head[1] and rank >= least and (not first or tonumber(head[2]) < first.score) then
          first = { id = head[1], score = tonumber(head[2]), key = key, model = model, tenant = tenant }
        end
      end
      if has_jobs then break end
      leave_share(tenant, model)
      tenant = redis.call('ZRANGE', shares_key(model), 0, 0)[1]
    end
  end
  return first
end

-- Before the job leaves its ready key.
local began = {}
local function charge(job)
  local charged = redis.call('ZADD', shares_key(job.model), 'XX', 'INCR', charge_of(job), job.tenant)
  if charged then began[job.model] = math.max(began[job.model] or -math.huge, charged - charge_of(job)) end
end

local function pass_time()
  for model, latest in pairs(began) do
    local debts = debts_key(model)
    redis.call('ZADD', debts, 'GT', latest, '')
    redis.call('ZREMRANGEBYSCORE', debts, '-inf', string.format('(%.17g', latest))
    redis.call('PEXPIRE', debts, DEBT_MS)
  end
end

local next_job = next_ready
if next_suspect() then
  if holds == 'nothing' then
    next_job, max_jobs = next_suspect, 1
  elseif (redis.call('GET', reserved) or worker) == worker then
    redis.call('SET', reserved, worker, 'PX', LEASE_MS)
    return { 'free_first' }
  end
end

local rows, claimed = 0, { token }
-- Bounded, so that a thousand dead entries do not hold up the server; the next claim goes on.
for _ = 1, max_jobs + 256 do
  local first = #reply < max_jobs and next_job()
  if not first then break end
  local id, job = first.id, load_job(first.id)
  if job and job.state == 'queued' and not is_past_deadline(job) then
    if #reply > 0 and rows + job.rows > max_rows then break end
    rows = rows + job.rows
    share[first.model] = share[first.model] - 1
    if not is_suspect(job) then charge(job) end
    leave_ready(id, job)
    redis.call('ZADD', leases, now_ms + LEASE_MS, id)
    local held = redis.call('HINCRBY', running, job.model, job.rows)
    redis.call('HSET', job_key(id), 'state', 'running', 'owner', worker, 'attempt', job.attempt + 1,
      'claimed_ms', now_ms, 'from_step', job.step, 'alone', held == job.rows and '1' or '')
    redis.call('HSETNX', job_key(id), 'started_ms', now_ms)
    add_event(id, 'running', job.step, job.num_steps, JOB_TTL_MS)
    claimed[#claimed + 1] = id
    claimed[#claimed + 1] = job.attempt + 1
    reply[#reply + 1] = describe(id)
  else
    if not job then
      fail_unreadable(id)
    elseif job.state == 'queued' then
      finish(id, job, 'expired')
    end
    redis.call('ZREM', first.key, id)
  end
  waiting[first.model] = waiting[first.model] - 1
end

pass_time()
local left_waiting = 0
for model, left in pairs(waiting) do
  left_waiting = left_waiting + math.max(0, left)
  if left <= 0 then
    redis.call('DEL', prefix .. 'notify:' .. model)
    -- Nothing waits, so what damaged records have left of the sum goes with it.
    redis.call('HDEL', backlog, model)
  end
end

if #reply > 0 then
  if redis.call('GET', reserved) == worker then redis.call('DEL', reserved) end
  redis.call('DEL', claim_key)
  redis.call('RPUSH', claim_key, unpack(claimed))
  redis.call('PEXPIRE', claim_key, LEASE_MS)
  -- The pace of claims tells a refused caller when to come back; a pause of a minute counts as a minute, and one before
  -- which nothing was left waiting not at all. Time and jobs have a mean each: a mean of their ratio would weigh a claim
  -- of one job like one of ten.
  local pace = redis.call('HMGET', prefix .. 'pace', 'claimed_ms', 'interval_ms', 'jobs', 'waiting')
  if pace[1] and pace[4] ~= '0' then
    local interval = math.min(60000, math.max(0, now_ms - pace[1]))
    interval = 0.9 * (pace[2] or interval) + 0.1 * interval
    local jobs = 0.9 * (pace[3] or #reply) + 0.1 * #reply
    redis.call('HSET', prefix .. 'pace', 'interval_ms', interval, 'jobs', jobs, 'gap_ms', interval / jobs)
  end
  redis.call('HSET', prefix .. 'pace', 'claimed_ms', now_ms, 'waiting', left_waiting)
  redis.call('EXPIRE', prefix .. 'pace', 3600)
end
return reply
