-- KEYS[1]: an index. ARGV[3], [4]: the range that is counted.
-- Answer: 0 to be asked again, 1 for a place that is not indexed, else a list of the number alone.

local wait = not_yet()
if wait then return wait end
return { call('ZLEXCOUNT', KEYS[1], ARGV[3], ARGV[4]) }
