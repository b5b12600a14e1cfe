-- Append entries to the change stream, in order. KEYS: the stream, the hash of its writers' last numbers.
-- ARGV[1]: the writer. ARGV[2]: about how many entries the stream keeps. Then for each entry the number of its
-- arguments and those: names and values. Answer: the entries' ids.

local refusal = stream_refusal(KEYS[1], KEYS[2], ARGV[1])
if refusal then return redis.error_reply('ERR ' .. refusal) end

local places, at = {}, 3
while at <= #ARGV do
  local last = at + tonumber(ARGV[at])
  places[#places + 1] = at + 1
  places[#places + 1] = last
  at = last + 1
end
return append_entries(KEYS[1], KEYS[2], ARGV[1], ARGV[2], places)
