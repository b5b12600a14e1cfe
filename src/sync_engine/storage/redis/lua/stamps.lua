-- The stamp of the item at each key, nil where there is no item.

local forms, stamps = heads(KEYS)
local answer = {}
for i = 1, #KEYS do answer[i] = forms[i] and forms[i] ~= FOREIGN and stamps[i] or false end
return answer
