-- Which weights made which tokens of an answer that spans a weight update, as the record's JSON: [[first token, version], …].
ALTER TABLE triplets_raw ADD COLUMN IF NOT EXISTS response_versions Nullable(String) CODEC(ZSTD(1)) AFTER prefix_characters;

-- `response_versions` is empty where one version made all tokens, or where it is not known.
CREATE OR REPLACE VIEW triplets AS
WITH JSONExtract(ifNull(t.response_versions, ''), 'Array(Tuple(UInt32, String))') AS parts
SELECT
    * EXCEPT (date, topic, partition, offset, response_versions),
    CAST(
        arrayMap(
            (part, at) -> (
                part.1,
                toUInt32(greatest(
                    if(at = length(parts), length(response_token_ids), parts[at + 1].1)::Int64 - part.1, 0
                )),
                part.2
            ),
            parts, arrayEnumerate(parts)
        ),
        'Array(Tuple(first_token UInt32, tokens UInt32, version String))'
    ) AS response_versions,
    toUInt32(prefix_tokens + length(prompt_token_ids)) AS prompt_tokens,
    toUInt32(length(response_token_ids)) AS response_tokens,
    topic, partition, offset
FROM triplets_raw AS t FINAL
SETTINGS do_not_merge_across_partitions_select_final = 1;
