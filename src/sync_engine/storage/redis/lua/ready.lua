-- Before a question about the indexes is answered: is the answer going to be right?

local SWEPT_MAX = 1000 -- 2-3 ms of the server
local SWEEP_AGAIN, NOT_INDEXED = 0, 1

-- What to answer instead, or nil.
local function not_yet()
  if not is_whole() then return NOT_INDEXED end
  if sweep(SWEPT_MAX) then return SWEEP_AGAIN end
end
