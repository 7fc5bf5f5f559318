-- Shared head of every script: key names, the clock, and the moves that more than one script makes.
--
-- KEYS[1] is the queue's prefix "{darkroom:<shard>}:". Every other key is derived from it, so a script touches one
-- shard's keys only and all of them lie in one Redis Cluster slot. keys.py documents each key.
-- The line before this one sets JOB_TTL_MS, RESULT_TTL_MS, LEASE_MS, MAX_FAILURES, NUM_RANKS and TERMINAL (state -> true).

local prefix = KEYS[1]

-- Redis server time is the only clock of deadlines and leases.
local time = redis.call('TIME')
local now_us = time[1] * 1000000 + time[2]
local now_ms = math.floor(now_us / 1000)

local leases, queued, counters = prefix .. 'leases', prefix .. 'queued', prefix .. 'counters'
local backlog = prefix .. 'backlog'

local function job_key(id) return prefix .. 'job:' .. id end
local function checkpoint_key(id, index) return prefix .. 'checkpoint:' .. id .. ':' .. index end
local function ready_key(rank, model) return prefix .. 'ready:' .. rank .. ':' .. model end

-- A job with which two workers were lost is run by a worker that holds nothing else, so it waits apart from the classes.
local SUSPECT_RANK = NUM_RANKS
local function ready_key_of(job)
  return ready_key(job.failures >= 2 and SUSPECT_RANK or job.rank, job.model)
end

-- At its memory limit Redis refuses a script whose first write may grow memory, and lets one through that has already
-- written. Scripts that lead to memory being freed begin with this harmless write; enqueue does not.
local function write_at_memory_limit() redis.call('DEL', prefix .. 'none') end

-- Read a job for a decision. nil when its record is missing or damaged.
local function load_job(id)
  local fields = redis.pcall('HMGET', job_key(id), 'state', 'model', 'rank', 'rows', 'score', 'attempt', 'failures',
    'reserved', 'deadline_ms', 'owner', 'cancel', 'idempotency', 'step', 'num_steps', 'cost',
    'checkpoints')
  if fields.err then return nil end
  local job = {
    state = fields[1], model = fields[2], rank = tonumber(fields[3] or ''), rows = tonumber(fields[4] or ''),
    score = tonumber(fields[5] or ''), attempt = tonumber(fields[6] or ''), failures = tonumber(fields[7] or ''),
    reserved = tonumber(fields[8] or ''), deadline_ms = tonumber(fields[9] or ''), owner = fields[10] or '',
    cancel = fields[11] == '1', idempotency = fields[12] or '', step = fields[13] or '0', num_steps = fields[14] or '0',
    cost = tonumber(fields[15] or '') or 0, num_checkpoints = tonumber(fields[16] or '') or 0,
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

local function make_ready(id, job)
  redis.call('ZADD', ready_key_of(job), job.score, id)
  redis.call('ZADD', queued, job.deadline_ms or '+inf', id)
  redis.call('HINCRBY', backlog, job.model, job.cost)
  wake_worker(job.model)
end

-- The opposite, for a job that is claimed or has ended. One that does not wait is left alone.
local function leave_ready(id, job)
  redis.call('ZREM', queued, id)
  if redis.call('ZREM', ready_key_of(job), id) == 1
    and redis.call('HINCRBY', backlog, job.model, 0 - job.cost) <= 0 then
    redis.call('HDEL', backlog, job.model)
  end
end

-- Give back what an ending job holds: its reservation, and its idempotency key, after a while.
local function release(reserved, digest)
  -- Not -reserved, which for 0 is "-0" and no integer to Redis.
  redis.call('HINCRBY', counters, 'reserved_bytes', 0 - reserved)
  if digest ~= '' then redis.call('PEXPIRE', prefix .. 'idempotency:' .. digest, JOB_TTL_MS) end
end

-- The same for a damaged record, as far as it can be read.
local function release_unreadable(id)
  local fields = redis.pcall('HMGET', job_key(id), 'reserved', 'idempotency')
  if fields.err then return end
  local reserved = tostring(fields[1])
  release(reserved:match('^%d+$') and #reserved < 16 and tonumber(reserved) or 0, fields[2] or '')
end

-- Move a job into a terminal state: the only place where that happens. `job` is nil for an unreadable record, which is
-- replaced by a readable failed one. More arguments are fields and values to set.
local function finish(id, job, state, ...)
  redis.call('ZREM', leases, id)
  if job then
    leave_ready(id, job)
    for index = 0, job.num_checkpoints - 1 do redis.call('UNLINK', checkpoint_key(id, index)) end
    release(job.reserved, job.idempotency)
  else
    redis.call('ZREM', queued, id)
    release_unreadable(id)
    redis.call('DEL', job_key(id))
    job = { step = 0, num_steps = 0 }
  end
  -- Finished records are what a busy server holds most of: they keep what a client may see and what fences off writers.
  -- First out, then in, so that the hash need not grow.
  redis.call('HDEL', job_key(id), 'model', 'rank', 'rows', 'score', 'reserved', 'idempotency', 'cancel',
    'cost', 'checkpoints')
  redis.call('HSET', job_key(id), 'state', state, 'finished_ms', now_ms, ...)
  redis.call('PEXPIRE', job_key(id), JOB_TTL_MS)
  redis.call('HINCRBY', counters, state, 1)
  add_event(id, state, job.step, job.num_steps, RESULT_TTL_MS)
  redis.call('PUBLISH', prefix .. 'ended', id)
end

local function fail_unreadable(id)
  finish(id, nil, 'failed', 'error_code', 'bad_message', 'error_message', 'the stored job cannot be read')
end

-- Put a running job back at its old place.
local function requeue(id, job)
  redis.call('ZREM', leases, id)
  -- The owner stays, so that a hand-back sent twice is recognised.
  redis.call('HSET', job_key(id), 'state', 'queued')
  add_event(id, 'queued', job.step, job.num_steps, JOB_TTL_MS)
  make_ready(id, job)
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
      'attempt', job.attempt, 'worker', job.owner, 'reason', reason,
      'payload', redis.call('HGET', job_key(id), 'payload') or '')
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

-- Remember until when a model has a worker: the last of its live ones, or now, as one was just there.
local function note_served(model)
  local last = redis.call('ZREVRANGE', prefix .. 'serving:' .. model, 0, 0, 'WITHSCORES')
  redis.call('ZADD', prefix .. 'served', math.max(now_ms, last[2] or 0), model)
end

-- How many jobs of the same model stand before this one; -1 when it is not waiting.
local function position(job)
  if not job or job.state ~= 'queued' then return -1 end
  local ahead = 0
  for rank = 0, SUSPECT_RANK do
    -- Scores have 16 digits; Lua's own conversion keeps 14.
    ahead = ahead + redis.call('ZCOUNT', ready_key(rank, job.model), '-inf', string.format('(%.0f', job.score))
  end
  return ahead
end

-- What a client may see of a job: its record and its position. A damaged record reads as an empty one with a state.
local function view(id)
  local record = redis.pcall('HGETALL', job_key(id))
  if record.err then record = { 'state', 'failed' } end
  return { record, position(load_job(id)) }
end
