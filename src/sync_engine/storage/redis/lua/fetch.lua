-- Read values of either form in one step, so that a change of form in between cannot look like a miss.
-- KEYS: the items' keys. Answer: the documents in that order (nil where there is none), then the strings of
-- the keys that have no document, in order. Other types read as nil.

local count = #KEYS
KEYS[count + 1] = '.'
local documents = redis.call('JSON.MGET', unpack(KEYS))
local rest = {}
for i = 1, count do
  if not documents[i] then rest[#rest + 1] = KEYS[i] end
end
if #rest == 0 then return { documents, rest } end
return { documents, redis.call('MGET', unpack(rest)) }
