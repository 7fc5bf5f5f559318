-- Shared head of every script: key names, the clock, and the moves that more than one script makes.
--
-- KEYS[1] is the queue's prefix "{darkroom:<shard>}:". Every other key is derived from it, so a script touches one
-- shard's keys only and all of them lie in one Redis Cluster slot. keys.py documents each key.
-- The line before this one sets JOB_TTL_MS, RESULT_TTL_MS, LEASE_MS, GRACE_MS, MAX_FAILURES, SUSPECT_FAILURES,
-- NUM_RANKS, TERMINAL (state -> true) and INPUT_NAMES.

local prefix = KEYS[1]

-- Redis server time is the only clock of deadlines and leases.
local time = redis.call('TIME')
local now_us = time[1] * 1000000 + time[2]
local now_ms = math.floor(now_us / 1000)

local leases, queued, counters = prefix .. 'leases', prefix .. 'queued', prefix .. 'counters'
local backlog, running, abandoned = prefix .. 'backlog', prefix .. 'running', prefix .. 'abandoned'

local function job_key(id) return prefix .. 'job:' .. id end
local function input_key(id, name) return prefix .. 'input:' .. id .. ':' .. name end
local function checkpoint_key(id, index) return prefix .. 'checkpoint:' .. id .. ':' .. index end
local function preview_key(id, index) return prefix .. 'preview:' .. id .. ':' .. index end
local function shares_key(model) return prefix .. 'shares:' .. model end
local function debts_key(model) return prefix .. 'debts:' .. model end
local function tenants_key(model) return prefix .. 'tenants:' .. model end

-- Without a tenant, or of the one that a server without API keys has, the waiting jobs lie where they always lay.
local function ready_key(rank, model, tenant)
  -- With its length before it, a name may hold colons.
  if tenant and tenant ~= 'default' then
    return prefix .. 'ready_of:' .. #tenant .. ':' .. tenant .. ':' .. rank .. ':' .. model
  end
  return prefix .. 'ready:' .. rank .. ':' .. model
end

-- A job with which SUSPECT_FAILURES workers were lost is run by a worker that holds nothing else, so it waits apart from
-- the classes, and from the shares of tenants.
local SUSPECT_RANK = NUM_RANKS
local function is_suspect(job) return job.failures >= SUSPECT_FAILURES end
local function ready_key_of(job)
  if is_suspect(job) then return ready_key(SUSPECT_RANK, job.model) end
  return ready_key(job.rank, job.model, job.tenant)
end

-- At its memory limit Redis refuses a script whose first write may grow memory, and lets one through that has already
-- written. Scripts that lead to memory being freed begin with this harmless write; enqueue does not.
local function write_at_memory_limit() redis.call('DEL', prefix .. 'none') end

-- Read a job for a decision. nil when its record is missing or damaged.
local function load_job(id)
  local fields = redis.pcall('HMGET', job_key(id), 'state', 'model', 'rank', 'rows', 'score', 'attempt', 'failures',
    'reserved', 'deadline_ms', 'owner', 'cancel', 'idempotency', 'step', 'num_steps', 'cost',
    'checkpoints', 'tenant', 'weight', 'claimed_ms', 'from_step', 'payer', 'alone')
  if fields.err then return nil end
  local job = {
    state = fields[1], model = fields[2], rank = tonumber(fields[3] or ''), rows = tonumber(fields[4] or ''),
    score = tonumber(fields[5] or ''), attempt = tonumber(fields[6] or ''), failures = tonumber(fields[7] or ''),
    reserved = tonumber(fields[8] or ''), deadline_ms = tonumber(fields[9] or ''), owner = fields[10] or '',
    cancel = fields[11], idempotency = fields[12] or '', step = fields[13] or '0', num_steps = fields[14] or '0',
    cost = tonumber(fields[15] or '') or 0, num_checkpoints = tonumber(fields[16] or '') or 0,
    tenant = fields[17] or 'default', weight = tonumber(fields[18] or '') or 1,
    claimed_ms = tonumber(fields[19] or ''), from_step = tonumber(fields[20] or '') or 0, payer = fields[21] or '',
    is_alone = fields[22] == '1',
  }
  if TERMINAL[job.state] then return job end
  if (job.state == 'queued' or job.state == 'running') and job.model and job.rank and job.rows and job.score
    and job.attempt and job.failures and job.reserved then
    return job
  end
  return nil
end

-- Does this worker's attempt still own the running job?
local function is_owned(job, worker, attempt)
  return job ~= nil and job.state == 'running' and job.owner == worker and job.attempt == attempt
end

-- Is an unfinished job another tenant's? What has ended keeps no tenant here.
local function is_others(job, tenant) return tenant ~= '' and job ~= nil and job.tenant ~= tenant end

-- What those who watch a job want to see of its running images.
local function looked_at(id)
  local until_ms = redis.call('HMGET', job_key(id), 'look_vae', 'look_linear')
  if tonumber(until_ms[1] or '0') > now_ms then return 'vae' end
  if tonumber(until_ms[2] or '0') > now_ms then return 'linear' end
  return 'off'
end

-- After how many steps the last preview of each image was made; '0' where there is none.
local function previews_of(id)
  local steps = {}
  for step in string.gmatch(redis.call('HGET', job_key(id), 'previews') or '', '%d+') do steps[#steps + 1] = step end
  return steps
end

local function is_past_deadline(job) return job.deadline_ms ~= nil and job.deadline_ms <= now_ms end

local function add_event(id, kind, step, num_steps, ttl_ms)
  local key = prefix .. 'events:' .. id
  redis.call('XADD', key, 'MAXLEN', 256, '*', 'kind', kind, 'step', step, 'num_steps', num_steps)
  redis.call('PEXPIRE', key, ttl_ms)
end

-- One token wakes one sleeping worker. The list is short because a worker claims several jobs per token, and an unused
-- token costs one empty claim.
local function wake_worker(model)
  local key = prefix .. 'notify:' .. model
  redis.call('LPUSH', key, '1')
  redis.call('LTRIM', key, 0, 63)
  redis.call('PEXPIRE', key, 60000)
end

-- Tenants share the workers of a model by start-time fair queueing. A claim goes to the tenant with the least virtual time
-- and charges it the job's cost over the tenant's weight. A model's own virtual time is the latest at which a claim
-- began; a tenant whose first job comes starts there, without a credit for the time it was away. One that leaves ahead
-- of it keeps that as a debt until the others have caught up, or for this long.
local DEBT_MS = 600000

local function virtual_time(model)
  local own = redis.call('ZSCORE', debts_key(model), '')
  if own then return tonumber(own) end
  return tonumber(redis.call('ZRANGE', shares_key(model), 0, 0, 'WITHSCORES')[2] or 0)
end

-- Where a tenant stands, or would if a job of its came now.
local function virtual_time_of(tenant, model)
  local own = redis.call('ZSCORE', shares_key(model), tenant)
  if own then return tonumber(own) end
  local model_time = virtual_time(model)
  return math.max(model_time, tonumber(redis.call('ZSCORE', debts_key(model), tenant) or model_time))
end

local function charge_of(job) return math.max(1, job.cost) / job.weight end

-- Tenants with jobs of a model, the one whose turn it is first. The default one is always named: an earlier release has
-- put its jobs there and no more.
local function tenants_of(model)
  local tenants = redis.call('ZRANGE', shares_key(model), 0, -1)
  for _, tenant in ipairs(tenants) do
    if tenant == 'default' then return tenants end
  end
  table.insert(tenants, 1, 'default')
  return tenants
end

-- How many jobs of a model a tenant has waiting, suspects left out.
local function waiting_of(tenant, model)
  local waiting = 0
  for rank = 0, NUM_RANKS - 1 do waiting = waiting + redis.call('ZCARD', ready_key(rank, model, tenant)) end
  return waiting
end

local function waiting_for(model)
  local waiting = redis.call('ZCARD', ready_key(SUSPECT_RANK, model))
  for _, tenant in ipairs(tenants_of(model)) do waiting = waiting + waiting_of(tenant, model) end
  return waiting
end

local function leave_share(tenant, model)
  local own = tonumber(redis.call('ZSCORE', shares_key(model), tenant) or '')
  if not own then return end
  if own > virtual_time(model) then
    redis.call('ZADD', debts_key(model), own, tenant)
    redis.call('PEXPIRE', debts_key(model), DEBT_MS)
  end
  redis.call('ZREM', shares_key(model), tenant)
  redis.call('HDEL', tenants_key(model), 'cost:' .. tenant, 'jobs:' .. tenant, 'weight:' .. tenant)
end

local function make_ready(id, job)
  redis.call('ZADD', ready_key_of(job), job.score, id)
  redis.call('ZADD', queued, job.deadline_ms or '+inf', id)
  redis.call('HINCRBY', backlog, job.model, job.cost)
  if not is_suspect(job) then
    if not redis.call('ZSCORE', shares_key(job.model), job.tenant) then
      redis.call('ZADD', shares_key(job.model), virtual_time_of(job.tenant, job.model), job.tenant)
      redis.call('HSET', tenants_key(job.model), 'weight:' .. job.tenant, job.weight)
    end
    redis.call('HINCRBY', tenants_key(job.model), 'cost:' .. job.tenant, job.cost)
    redis.call('HINCRBY', tenants_key(job.model), 'jobs:' .. job.tenant, 1)
  end
  wake_worker(job.model)
end

-- The opposite, for a job that is claimed or has ended. One that does not wait is left alone.
local function leave_ready(id, job)
  redis.call('ZREM', queued, id)
  if redis.call('ZREM', ready_key_of(job), id) == 0 then return end
  if redis.call('HINCRBY', backlog, job.model, 0 - job.cost) <= 0 then
    redis.call('HDEL', backlog, job.model)
  end
  if is_suspect(job) then return end
  redis.call('HINCRBY', tenants_key(job.model), 'cost:' .. job.tenant, 0 - job.cost)
  redis.call('HINCRBY', tenants_key(job.model), 'jobs:' .. job.tenant, -1)
  local keys = {}
  for rank = 0, NUM_RANKS - 1 do keys[rank + 1] = ready_key(rank, job.model, job.tenant) end
  if redis.call('EXISTS', unpack(keys)) == 0 then leave_share(job.tenant, job.model) end
end

-- A job is not with a worker any more.
local function leave_running(job)
  if redis.call('HINCRBY', running, job.model, 0 - job.rows) <= 0 then redis.call('HDEL', running, job.model) end
end

-- Give back what an ending job holds: its reservation, its part of a budget, and its idempotency key, after a while.
local function release(reserved, digest, payer, cost)
  -- Not -reserved, which for 0 is "-0" and no integer to Redis.
  redis.call('HINCRBY', counters, 'reserved_bytes', 0 - reserved)
  if digest ~= '' then redis.call('PEXPIRE', prefix .. 'idempotency:' .. digest, JOB_TTL_MS) end
  if payer ~= '' and redis.call('HINCRBY', prefix .. 'budget', payer, 0 - cost) <= 0 then
    redis.call('HDEL', prefix .. 'budget', payer)
  end
end

-- The same for a damaged record, as far as it can be read.
local function release_unreadable(id)
  local fields = redis.pcall('HMGET', job_key(id), 'reserved', 'idempotency', 'payer', 'cost')
  if fields.err then return end
  local function whole(text)
    text = tostring(text)
    return text:match('^%d+$') and #text < 16 and tonumber(text) or 0
  end
  release(whole(fields[1]), fields[2] or '', fields[3] or '', whole(fields[4]))
end

-- Move a job into a terminal state: the only place where that happens. `job` is nil for an unreadable record, which is
-- replaced by a readable failed one. More arguments are fields and values to set.
local function finish(id, job, state, ...)
  redis.call('ZREM', leases, id)
  if not job or job.idempotency ~= '' then redis.call('ZREM', abandoned, id) end
  -- A dead letter keeps what it began with as long as its record, so that it may be replayed.
  for _, name in ipairs(INPUT_NAMES) do
    if job and job.is_dead then
      redis.call('PEXPIRE', input_key(id, name), JOB_TTL_MS)
    else
      redis.call('UNLINK', input_key(id, name))
    end
  end
  if job then
    if job.state == 'running' then leave_running(job) end
    leave_ready(id, job)
    for index = 0, job.num_checkpoints - 1 do redis.call('UNLINK', checkpoint_key(id, index)) end
    for index = 0, #previews_of(id) - 1 do redis.call('UNLINK', preview_key(id, index)) end
    release(job.reserved, job.idempotency, job.payer, job.cost)
  else
    redis.call('ZREM', queued, id)
    release_unreadable(id)
    redis.call('DEL', job_key(id))
    job = { step = 0, num_steps = 0 }
  end
  -- Finished records are what a busy server holds most of: they keep what a client may see and what fences off writers.
  -- First out, then in, so that the hash need not grow.
  redis.call('HDEL', job_key(id), 'model', 'rank', 'rows', 'score', 'reserved', 'idempotency', 'cancel',
    'cost', 'checkpoints', 'tenant', 'weight', 'claimed_ms', 'from_step', 'payer', 'alone', 'look_linear', 'look_vae',
    'previews')
  redis.call('HSET', job_key(id), 'state', state, 'finished_ms', now_ms, ...)
  redis.call('PEXPIRE', job_key(id), JOB_TTL_MS)
  redis.call('HINCRBY', counters, state, 1)
  add_event(id, state, job.step, job.num_steps, RESULT_TTL_MS)
  redis.call('PUBLISH', prefix .. 'ended', id)
end

local function fail_unreadable(id)
  finish(id, nil, 'failed', 'error_code', 'bad_message', 'error_message', 'the stored job cannot be read')
end

-- Cancel a job: at once when it waits, by its worker when it runs, not at all when it has ended. With `keeps` the worker
-- makes pictures of what it has drawn, unless it was to drop them already.
local function ask_to_cancel(id, job, keeps)
  if job.state == 'queued' then
    finish(id, job, 'cancelled')
  elseif job.state == 'running' then
    keeps = keeps and job.cancel ~= '1'
    redis.call('HSET', job_key(id), 'cancel', keeps and 'keep' or '1')
    redis.call('PUBLISH', prefix .. 'cancel:' .. job.owner, keeps and id .. ' keep' or id)
  end
end

-- Put a running job back at its old place. What its tenant was charged for it is given back, so that it is that tenant's
-- turn as it was before; the next claim charges it again. A suspect is not charged again.
local function requeue(id, job)
  redis.call('ZREM', leases, id)
  leave_running(job)
  -- The owner stays, so that a hand-back sent twice is recognised.
  redis.call('HSET', job_key(id), 'state', 'queued')
  add_event(id, 'queued', job.step, job.num_steps, JOB_TTL_MS)
  make_ready(id, job)
  if not is_suspect(job) then redis.call('ZINCRBY', shares_key(job.model), 0 - charge_of(job), job.tenant) end
end

-- A worker was lost with a running job, or says that the job took its device along. It fails as a dead letter when that
-- has happened MAX_FAILURES times. Returns what became of it.
local function lose(id, job, reason, max_dead_letters)
  job.failures = redis.call('HINCRBY', job_key(id), 'failures', 1)
  if job.cancel then
    finish(id, job, 'cancelled')
    return 'cancelled'
  elseif job.failures >= MAX_FAILURES then
    redis.call('XADD', prefix .. 'dead', 'MAXLEN', max_dead_letters, '*', 'job', id, 'failures', job.failures,
      'attempt', job.attempt, 'worker', job.owner, 'reason', reason, 'reserved', job.reserved,
      'payload', redis.call('HGET', job_key(id), 'payload') or '')
    job.is_dead = true
    finish(id, job, 'failed', 'error_code', 'dead_letter', 'error_message',
      'given up after ' .. job.failures .. ' workers were lost while they ran it')
    return 'dead'
  elseif is_past_deadline(job) then
    finish(id, job, 'expired')
    return 'expired'
  end
  requeue(id, job)
  return 'requeued'
end

-- Say that leases and those who wait are looked after: what runs out has been given up. It holds for longer than any
-- pause of those who reap, which is a second or a third of a lease, and than a restart of this server takes.
local function look_after()
  redis.call('SET', prefix .. 'looked_after', '1', 'PX', math.max(5000, math.ceil(LEASE_MS / 2)))
end

-- Remember until when a model has a worker: the last of its live ones, or now, as one was just there.
local function note_served(model)
  local last = redis.call('ZREVRANGE', prefix .. 'serving:' .. model, 0, 0, 'WITHSCORES')
  redis.call('ZADD', prefix .. 'served', math.max(now_ms, last[2] or 0), model)
end

-- Milliseconds that a job takes once it is claimed, and the cost per millisecond of all live workers: nothing before one
-- has measured its rate or while none lives. It takes what its cost and that of the rows beside it take a worker, but no
-- less than its evaluations were measured to take alone, when ticks are far from full. The third is the least it takes
-- by itself, the fourth how many model rows workers hold of this model.
local function pace_for(job)
  local rate = tonumber(redis.call('HGET', prefix .. 'rates', job.model) or '')
  local workers = redis.call('ZCOUNT', prefix .. 'serving:' .. job.model, now_ms, '+inf')
  if not rate or rate <= 0 or workers == 0 then return nil end
  local held = tonumber(redis.call('HGET', running, job.model) or 0) - (job.state == 'running' and job.rows or 0)
  local span_ms = tonumber(redis.call('HGET', prefix .. 'spans', job.model) or '')
  local by_cost = 1000 * job.cost / rate
  local alone = span_ms and span_ms * job.cost / job.rows or by_cost
  local crowded = by_cost * (1 + math.max(0, held) / workers / job.rows)
  return math.max(crowded, alone), workers * rate / 1000, math.min(by_cost, alone), held
end

-- How many jobs of the same model stand before one that waits (`is_ready`) or that may come, and their cost. Its own
-- tenant's are counted by score. Of another tenant's it is as many as that one's share comes to meanwhile, if none of
-- them costs more than the others.
local function ahead_of(job, is_ready)
  local model, tenant = job.model, job.tenant
  -- Scores have 16 digits; Lua's own conversion keeps 14.
  local before = string.format('(%.0f', job.score)
  local suspects = redis.call('ZCOUNT', ready_key(SUSPECT_RANK, model), '-inf', before)
  if is_suspect(job) then return suspects, 0 end
  local ahead, cost = 0, 0
  for rank = 0, NUM_RANKS - 1 do
    ahead = ahead + redis.call('ZCOUNT', ready_key(rank, model, tenant), '-inf', before)
  end
  if ahead > 0 then
    local others = waiting_of(tenant, model) - (is_ready and 1 or 0)
    local theirs = (redis.call('HGET', tenants_key(model), 'cost:' .. tenant) or 0) - (is_ready and job.cost or 0)
    cost = math.max(0, theirs) * ahead / math.max(ahead, others)
  end
  local shares = redis.call('ZRANGE', shares_key(model), 0, -1, 'WITHSCORES')
  if #shares == 0 or (#shares == 2 and shares[1] == tenant) then return suspects + ahead, cost end
  local turn = virtual_time_of(tenant, model) + math.max(ahead, cost) / job.weight
  -- In one call, whatever the number of tenants: this is asked with each new job, and each look at one that waits.
  local fields, held = redis.call('HGETALL', tenants_key(model)), {}
  for i = 1, #fields, 2 do held[fields[i]] = tonumber(fields[i + 1]) end
  for i = 1, #shares, 2 do
    local left = turn - shares[i + 1]
    if shares[i] ~= tenant and left >= 0 then
      local waiting = held['jobs:' .. shares[i]] or 0
      local mean = (held['cost:' .. shares[i]] or 0) / math.max(1, waiting)
      -- At equal times names decide, as they do in a sorted set.
      local jobs = left * (held['weight:' .. shares[i]] or 1) / math.max(1, mean)
      jobs = math.min(waiting, shares[i] < tenant and math.floor(jobs) + 1 or math.ceil(jobs))
      ahead, cost = ahead + jobs, cost + jobs * mean
    end
  end
  return suspects + ahead, cost
end

-- Position, and milliseconds until it will be done, of a job that waits or may come; with '' where nobody knows. Then the
-- least that it takes by itself, and whether nothing at all stands in its way.
local function estimate(job, is_ready)
  local ahead, cost = ahead_of(job, is_ready)
  local own_ms, pace, least_ms, held = pace_for(job)
  return ahead, pace and math.ceil(cost / pace + own_ms) or '', least_ms, ahead == 0 and held == 0
end

-- Milliseconds until a running job will be done: by its own progress, once there is some, else by what others took.
local function left_ms(job)
  local elapsed = job.claimed_ms and now_ms - job.claimed_ms
  local step, num_steps = tonumber(job.step), tonumber(job.num_steps)
  if elapsed and step > job.from_step then
    return math.ceil(elapsed * (num_steps - step) / (step - job.from_step))
  end
  local own_ms = pace_for(job)
  return elapsed and own_ms and math.max(0, math.ceil(own_ms - elapsed)) or ''
end

-- Position, -1 when it does not wait, and milliseconds until it will be done, '' when nobody knows or it is.
local function prospects(job)
  if job and job.state == 'queued' then
    local ahead, eta_ms = estimate(job, true)
    return ahead, eta_ms
  end
  return -1, job and job.state == 'running' and left_ms(job) or ''
end

-- What a client may see of a job: its record and its prospects. A damaged record reads as an empty one with a state.
local function view(id)
  local record = redis.pcall('HGETALL', job_key(id))
  if record.err then record = { 'state', 'failed' } end
  return { record, prospects(load_job(id)) }
end
