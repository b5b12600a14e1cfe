-- Which of the keys hold an item. Answer: 1 or 0 for each, in order.

local forms = heads(KEYS)
local answer = {}
for i = 1, #KEYS do answer[i] = forms[i] and forms[i] ~= FOREIGN and 1 or 0 end
return answer
