-- Answer: the state of the item at each key, nil where there is no item.

local _, _, states = heads(KEYS)
local answer = {}
for i = 1, #KEYS do answer[i] = states[i] or false end
return answer
