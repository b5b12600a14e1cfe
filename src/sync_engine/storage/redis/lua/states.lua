-- Questions about one state set, answered after the members whose values have expired are swept out.
-- KEYS[1]: the set. ARGV[3]: 'count'; 'has', with ARGV[4] the id; or 'page', with ARGV[4] the cursor and
-- ARGV[5] how many members to aim at. Answers: a number; 1 or 0; the next cursor and ids.

sweep(now_ms())
local question = ARGV[3]
if question == 'count' then return call('SCARD', KEYS[1]) end
if question == 'has' then return call('SISMEMBER', KEYS[1], ARGV[4]) end
return call('SSCAN', KEYS[1], ARGV[4], 'COUNT', ARGV[5])
