-- Writes session records of 1 to 3 KiB: ARGV is fill FROM COUNT SEED, which adds
-- records in order, or update RECORDS COUNT SEED, which rewrites random ones.
local mode, number, count, seed = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
math.randomseed(seed * 7919 + (mode == 'update' and 1 or 0))
local random = math.random
local words = {
    'checkout', 'basket', 'search', 'product', 'category', 'payment', 'invoice', 'delivery',
    'account', 'settings', 'message', 'profile', 'history', 'discount', 'review', 'support',
}
local function record(key)
    local parts = { string.format('{"id":%d,"user":"user%d@example.com","token":"', key, random(1000000)) }
    for _ = 1, 8 do
        parts[#parts + 1] = string.format('%08x', random(0, 2147483647))
    end
    parts[#parts + 1] = '","events":['
    for _ = 1, random(10, 30) do
        parts[#parts + 1] = string.format('{"at":%d,"page":"/%s/%d","ms":%d,"ref":"%08x"},',
            1700000000 + random(30000000), words[random(#words)], random(100000), random(2000), random(0, 2147483647))
    end
    parts[#parts + 1] = '{}]}'
    return table.concat(parts)
end
for index = 1, count do
    local key = mode == 'fill' and number + index or random(number)
    redis.call('SET', 'session:' .. key, record(key))
end
return count
