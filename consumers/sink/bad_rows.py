"""Which of ClickHouse's errors mean that a row is bad. All others mean that the server can't take rows now."""

from typing import Final

from clickhouse_connect.driver.exceptions import DatabaseError

# By ClickHouse's error code. Everything else (no answer, a time-out, too many parts, no memory, a full disk, a table in
# read-only mode, a missing privilege, a truncated request) is retried: that loses nothing and is visible, while a dead
# letter for a good row would leave a hole in the tables.
BAD_ROWS: Final = {
    6: "CANNOT_PARSE_TEXT",
    27: "CANNOT_PARSE_INPUT_ASSERTION_FAILED",
    38: "CANNOT_PARSE_DATE",
    41: "CANNOT_PARSE_DATETIME",
    53: "TYPE_MISMATCH",
    69: "ARGUMENT_OUT_OF_BOUND",
    70: "CANNOT_CONVERT_TYPE",
    72: "CANNOT_PARSE_NUMBER",
    117: "INCORRECT_DATA",
    128: "TOO_LARGE_ARRAY_SIZE",
    131: "TOO_LARGE_STRING_SIZE",
    153: "ILLEGAL_DIVISION",
    190: "SIZES_OF_ARRAYS_DONT_MATCH",
    321: "VALUE_IS_OUT_OF_RANGE_OF_DATA_TYPE",
    349: "CANNOT_INSERT_NULL_IN_ORDINARY_COLUMN",
    376: "CANNOT_PARSE_UUID",
    395: "FUNCTION_THROW_IF_VALUE_IS_NON_ZERO",  # which a view of the operator's own may raise
    407: "DECIMAL_OVERFLOW",
    469: "VIOLATED_CONSTRAINT",
    691: "UNKNOWN_ELEMENT_OF_ENUM",
}

# Texts of errors whose code can mean anything, but which mean a row here: a body that isn't valid Avro, bytes of tokens
# that end within a number, and an error of the embedded engine that can't be read: it quotes a text that isn't UTF-8.
BAD_ROW_WORDS: Final = ("avro::Exception", "ColumnArray::insertData", "'utf-8' codec can't decode")


def is_bad_row(error: DatabaseError) -> bool:
    return error.code in BAD_ROWS or any(words in str(error) for words in BAD_ROW_WORDS)
