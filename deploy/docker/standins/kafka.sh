#!/bin/bash
# Kafka from the jars in /opt/kafka/libs. KAFKA_FOO_BAR=x becomes foo.bar=x, as in the official image.
set -eu
env | grep '^KAFKA_' | while IFS='=' read -r name value; do
  key=${name#KAFKA_}
  key=${key//_/.}
  echo "${key,,}=$value"
done > /tmp/server.properties
data=$(sed -n 's/^log.dirs=//p' /tmp/server.properties)
java=(java -Xmx512m -XX:TieredStopAtLevel=1 -XX:+UseSerialGC -Dorg.slf4j.simpleLogger.logFile=System.out -cp '/opt/kafka/libs/*')
[ -e "$data/meta.properties" ] || "${java[@]}" kafka.tools.StorageTool format -t MkU3OEVBNTcwNTJENDM2Qg -c /tmp/server.properties
exec "${java[@]}" kafka.Kafka /tmp/server.properties
