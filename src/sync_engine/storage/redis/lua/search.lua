-- One search of one server's index, and in the same moment whether its answer can be relied on.
-- ARGV[1]: of how many shards the index has the items; their prefixes; then what FT.SEARCH takes.
-- Answer: the numbers among those, from 0, of shards with items to let go (lapse.lua), of shards that are not here or
-- could not be asked; then the reply as RESP3 has it, or the text of a refusal.
-- Keys of several slots, all of them on this server: so it is for reading only, and no key is declared.

local count = tonumber(ARGV[1])
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
local due, away = {}, {}
for n = 1, count do
  local found = redis.pcall('ZRANGE', ARGV[n + 1] .. '__local__:expiring', '-inf', now, 'BYSCORE', 'LIMIT', 0, 1)
  if found.err then away[#away + 1] = n - 1 elseif #found > 0 then due[#due + 1] = n - 1 end
end
redis.setresp(3)
local reply = redis.pcall('FT.SEARCH', unpack(ARGV, count + 2))
return { due, away, reply.err or reply }
