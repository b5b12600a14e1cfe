-- Of items picked at random those that were used the longest ago. KEYS[1]: the index of ids. ARGV[3]: how many are
-- picked. ARGV[4]: how many are named at most. Answer, flat: id and stamp of each, coldest first.
-- To look how long a key has been idle is no use of it. To read its stamp is one: what is named and stays is not named
-- again so soon.

-- nil for a key that is gone, or where the server tells neither.
local function coldness(key)
  local idle = try('OBJECT', 'IDLETIME', key)
  if type(idle) == 'number' then return idle end
  if not idle then return end
  local uses = try('OBJECT', 'FREQ', key) -- an LFU policy counts uses instead
  return type(uses) == 'number' and -uses or nil
end

local found = {}
for _, id in ipairs(call('ZRANDMEMBER', KEYS[1], ARGV[3])) do
  local cold = coldness(prefix .. id)
  if cold then found[#found + 1] = { cold, id } end
end
table.sort(found, function(a, b) return a[1] > b[1] end)
local count = math.min(#found, tonumber(ARGV[4]))
if count == 0 then return {} end

local keys, answer = {}, {}
for i = 1, count do keys[i] = prefix .. found[i][2] end
local forms, stamps = heads(keys)
for i = 1, count do
  if forms[i] and forms[i] ~= FOREIGN then
    answer[#answer + 1] = found[i][2]
    answer[#answer + 1] = stamps[i]
  end
end
return answer
