-- Ask for a job to be cancelled.
--
-- ARGV 1 job id   2 the caller's tenant, '' for one who may cancel all jobs   3 '1' to keep what a running one has drawn
-- Writes what ask_to_cancel() writes. Returns view().

local id = ARGV[1]
write_at_memory_limit()
local job = load_job(id)
if job and not is_others(job, ARGV[2]) then ask_to_cancel(id, job, ARGV[3] == '1') end
return view(id)
