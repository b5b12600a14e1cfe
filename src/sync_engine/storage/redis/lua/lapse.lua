-- Let what has expired leave Redis, its search indexes and our sets: one bounded step. ARGV[3]: at most how many.
-- Answer: how many were due. A key that nobody touches after its deadline would still be counted by a search.

local due = due_now(now_ms(), tonumber(ARGV[3]))
local count = #due.done + #due.later
if count > 0 then
  local refusal = layout_refusal()
  if refusal then return redis.error_reply(refusal) end
  sweep_out(due)
end
return count
